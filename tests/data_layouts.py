"""The same small photographs and captions in every layout that the data sets come in."""

import json
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

SPLITS = ("train",) * 6 + ("restval",) * 2 + ("val",) * 2 + ("test",) * 3
CHANNELS, REGIONS = 8, 3


def captions_of(row):
    return [f"photograph {row} shows {thing}" for thing in ("a dog", "a cat", "a red kite", "two boats", "the sea")]


def coco_part(row):
    return "train2014" if SPLITS[row] == "train" else "val2014"


def name_of(row, *, coco):
    return f"COCO_{coco_part(row)}_{391000 + row:012d}.jpg" if coco else f"{1000092795 + row}.jpg"


def write_image(path, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(row).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def features_of(row):
    return np.random.default_rng(100 + row).normal(size=(REGIONS, CHANNELS)).astype(np.float32)


def karpathy_entry(row, *, coco):
    sentences = [
        {"tokens": caption.split(), "raw": caption, "imgid": row, "sentid": 5 * row + place}
        for place, caption in enumerate(captions_of(row))
    ]
    entry = {
        "sentids": [sentence["sentid"] for sentence in sentences],
        "imgid": row,
        "sentences": sentences,
        "split": SPLITS[row],
        "filename": name_of(row, coco=coco),
    }
    return entry | ({"filepath": coco_part(row), "cocoid": 391000 + row} if coco else {})


def write_karpathy(folder, *, coco=False, images="images", change=lambda content: None):
    """`dataset_flickr30k.json` or `dataset_coco.json` beside the images; `change` edits the JSON before it is written."""
    name = "coco" if coco else "flickr30k"
    content = {"images": [karpathy_entry(row, coco=coco) for row in range(len(SPLITS))], "dataset": name}
    for row in range(len(SPLITS)):
        below = f"{coco_part(row)}/" if coco else ""
        write_image(folder / images / (below + name_of(row, coco=coco)), row)
    change(content)
    (folder / f"dataset_{name}.json").write_text(json.dumps(content))
    return folder


def write_vsepp(folder):
    """COCO's captions, VSE++'s lists of annotation ids in `annotations/`, and the images."""
    (folder / "annotations").mkdir(parents=True)
    for part in ("train2014", "val2014"):
        rows = [row for row in range(len(SPLITS)) if coco_part(row) == part]
        content = {
            "info": {},
            "images": [{"id": 391000 + row, "file_name": name_of(row, coco=True), "height": 9} for row in rows],
            "annotations": [
                {"image_id": 391000 + row, "id": 70000 + 5 * row + place, "caption": caption}
                for row in reversed(rows)
                for place, caption in enumerate(captions_of(row))
            ],
        }
        (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))
        for row in rows:
            write_image(folder / "images" / part / name_of(row, coco=True), row)
    for split, called in (("train", "train"), ("restval", "restval"), ("val", "dev"), ("test", "test")):
        write_ids(folder, called, [70000 + 5 * row + i for row in rows_of(split) for i in range(5)])
    return folder


def write_ids(folder, split, ids):
    np.save(folder / "annotations" / f"coco_{split}_ids.npy", np.array(ids))


def rows_of(split):
    return [row for row, one in enumerate(SPLITS) if one == split]


def write_scan(folder, *, repeated=()):
    """SCAN's files; of the splits `repeated` every row is written once for each of its captions. SCAN has no restval."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, called in (("train", "train"), ("val", "dev"), ("test", "test")):
        rows = rows_of(split)
        features = np.stack([features_of(row) for row in rows])
        np.save(folder / f"{called}_ims.npy", np.repeat(features, 5, axis=0) if called in repeated else features)
        lines = [caption + "\n" for row in rows for caption in captions_of(row)]
        (folder / f"{called}_caps.txt").write_text("".join(lines))
    return folder


def boxes_of(row):
    return np.random.default_rng(200 + row).uniform(1, 90, (REGIONS, 6)).astype(np.float32)


def classes_of(row, num_classes=5):
    return np.random.default_rng(300 + row).random((REGIONS, num_classes), dtype=np.float32)


def write_vlp(folder, *, coco):
    """VLP's features, class probabilities and boxes, named as theirs; returns what --regions takes."""
    place = folder / ("feat_cls_1000" if coco else "trainval")
    place.mkdir(parents=True)
    prefix = place / "coco_detection_vg_100dets_gvd_checkpoint_trainval"
    for row in range(len(SPLITS)):
        stem = Path(name_of(row, coco=coco)).stem
        with h5py.File(folder / "detection_vg_thresh0.2_feat_gvd_checkpoint_trainvaltest.h5", "a") as file:
            file[stem] = boxes_of(row)
        if not coco:
            np.save(place / f"{stem}.npy", features_of(row))
            np.save(place / f"{stem}_cls_prob.npy", classes_of(row))
            continue
        for kind, values in (("feat", features_of(row)), ("cls", classes_of(row))):
            with h5py.File(f"{prefix}_{kind}{stem[-3:]}.h5", "a") as file:
                file[stem] = values
    return prefix if coco else place
