"""The authors' data code: word pieces, collation, position features, GloVe and VSRN's data set, from files in their formats to arrays."""

from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dualmatch.models.vsrn_caption import caption_targets
from dualmatch.runtime.datasets.scan import ScanSplit
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.region_readers import CocoRegions, FlickrRegions
from dualmatch.runtime.tokenizer import CaptionTokenizer
from dualmatch.training.authors_data import BERT_OPTIONS, WORD_OPTIONS, Collated, bert_tokenizer, collate
from dualmatch.training.glove import initialise_from_glove, read_glove
from dualmatch.training.treebank import treebank_tokenizer
from dualmatch.training.vocabulary import save_tokenizer

from .cases import folders_of, read_json

torch.set_num_threads(1)


def each(names, found):
    """One test for every entry, its name telling which."""
    return pytest.mark.parametrize(
        names, found, ids=lambda value: value.name if isinstance(value, Path) else str(value)
    )


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def equal(ours, theirs):
    np.testing.assert_array_equal(ours, theirs)
    assert np.asarray(ours).dtype.kind == np.asarray(theirs).dtype.kind


FILES = {
    "dsran_bert_tokens": {"tokens.json"},
    "dsran_gru_collate": {"collate.json"},
    "dsran_region_data": {"position.json", "position.npz"},
    "vsrn_precomp_dataset": {"collated.npz", "dataset.json"},
}


@pytest.mark.parametrize(
    "folder", [folder for kind in FILES for folder in folders_of(kind)], ids=lambda folder: folder.name
)
def test_no_file_is_passed_over(folder):
    (known,) = (files for kind, files in FILES.items() if folder in folders_of(kind))
    assert {path.name for path in folder.iterdir()} == known


# Word pieces of DSRAN-BERT.

TOKENS = "tokens.json"
PIECE_ROWS = [
    (folder, index, aspect)
    for folder in folders_of("dsran_bert_tokens")
    for index, row in enumerate(read_json(folder / TOKENS)["rows"])
    for aspect in sorted(row.keys() - {"caption"})
]


@pytest.mark.parametrize("folder", folders_of("dsran_bert_tokens"), ids=lambda folder: folder.name)
def test_the_word_pieces_have_no_other_facts(folder):
    facts = read_json(folder / TOKENS)
    assert facts.keys() == {"vocab", "max_seq_len", "rows"}
    assert facts["rows"]
    assert facts["max_seq_len"] == BERT_OPTIONS.fixed_length == BERT_OPTIONS.max_length


@each("folder, case, aspect", PIECE_ROWS)
def test_word_pieces(folder, case, aspect, tmp_path):
    row = read_json(folder / TOKENS)["rows"][case]
    tokenizer = bert_tokenizer(read_json(folder / TOKENS)["vocab"])
    encoded = tokenizer.encode(row["caption"])
    if aspect == "wordpieces":
        assert encoded.tokens[1:-1] == row[aspect]
        return
    assert aspect == "ids", f"nothing tests {aspect!r}"
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    served = CaptionTokenizer(tmp_path / "tokenizer.json", BERT_OPTIONS)
    if row["caption"].strip():
        equal(served([row["caption"]])[0], row[aspect])
    else:  # theirs gives ids to no caption at all; ours refuses it, and the ids beneath are the same
        with pytest.raises(DualmatchError, match="empty"):
            served([row["caption"]])
        equal(served.pad([encoded.ids])[0], row[aspect])


# Collation of DSRAN-GRU.

COLLATE = "collate.json"


def images_in_order(batch: Collated):
    """Images filled with their own place, as theirs were."""
    return np.arange(len(batch.order), dtype=np.float64)[batch.order].tolist()


COLLATED = {
    "targets": lambda batch, _: batch.token_ids.tolist(),
    "lengths": lambda batch, _: batch.lengths.tolist(),
    "ids": lambda batch, indices: np.array(indices)[batch.order].tolist(),
    "image_order": lambda batch, _: images_in_order(batch),
}


@each(
    "folder, aspect",
    [
        (folder, aspect)
        for folder in folders_of("dsran_gru_collate")
        for aspect in sorted(read_json(folder / COLLATE).keys() - {"captions_in", "indices_in", "note"})
    ],
)
def test_collation(folder, aspect):
    golden = read_json(folder / COLLATE)
    assert aspect in COLLATED, f"nothing tests {aspect!r}"
    assert COLLATED[aspect](collate(golden["captions_in"]), golden["indices_in"]) == golden[aspect]


# Region files of VLP, and position features.

POSITION = "position.json"


class VlpFiles:
    """A golden image's region files, written in VLP's two layouts and read back."""

    def __init__(self, folder: Path, case: str, out: Path) -> None:
        self.facts = read_json(folder / POSITION)[case]
        self.theirs = {
            name.partition("/")[2]: value
            for name, value in arrays(folder / "position.npz").items()
            if name.startswith(f"{case}/")
        }
        self.image_id = self.facts["image_id"] + ".jpg"
        kind, num_boxes = np.dtype(self.facts["stored_dtype"]), len(self.theirs["bbox"])
        numbers = np.random.default_rng(7)
        self.stored = numbers.random((num_boxes, 24)).astype(kind)
        # The goldens keep the probabilities of the first boxes only; rows do not depend on each other.
        classes = numbers.random((num_boxes, self.theirs["cls_prob"].shape[1])).astype(kind)
        classes[: len(self.theirs["cls_prob"])] = self.theirs["cls_prob"]
        names = [name.replace("<prefix>", "vg_100dets").replace("<bbox>", "boxes") for name in self.facts["files"]]
        for name, values in zip(names, (self.stored, classes, self.theirs["bbox"]), strict=True):
            with h5py.File(out / name, "w") as file:
                file[self.facts["image_id"]] = values
        np.save(out / f"{self.facts['image_id']}.npy", self.stored)
        np.save(out / f"{self.facts['image_id']}_cls_prob.npy", classes)
        self.coco = CocoRegions(out / "vg_100dets", out / "boxes.h5")
        self.flickr = FlickrRegions(out, out / "boxes.h5")

    def both_equal(self) -> bool:
        same = [getattr(self.coco, what)(self.image_id) for what in ("features", "positions")]
        return all(
            np.array_equal(one, getattr(self.flickr, what)(self.image_id))
            for one, what in zip(same, ("features", "positions"), strict=True)
        )


def ulps(ours, theirs):
    assert ours.dtype == theirs.dtype == np.float32
    # Both are torch's layer_norm; how it adds depends on the processor's vector width, and that shows in the last bits.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-7 * np.abs(theirs).max())


def coco_features_are_float32(files):
    found = files.coco.features(files.image_id)
    equal(found, files.stored.astype(np.float32))
    return found.dtype == np.float32


def flickr_features(files):
    """Theirs keeps the type of the file; ours gives its numbers as the network takes them."""
    equal(files.flickr.features(files.image_id), files.stored.astype(np.float32))
    return f"torch.{files.stored.dtype}"


POSITIONS = {
    "coco_pos6": lambda f: ulps(f.coco.positions(f.image_id)[:, :6], f.theirs["coco_pos6"]),
    "coco_poscls": lambda f: ulps(
        f.coco.positions(f.image_id)[: len(f.theirs["coco_poscls"]), 6:], f.theirs["coco_poscls"]
    ),
    "coco_feat_dtype_is_float32": lambda f: equal(
        coco_features_are_float32(f), bool(f.theirs["coco_feat_dtype_is_float32"])
    ),
    "shape": lambda f: equal(f.coco.positions(f.image_id).shape, f.facts["shape"]),
    "flickr_equals_coco": lambda f: equal(f.both_equal(), f.facts["flickr_equals_coco"]),
    "coco_feat_dtype": lambda f: equal(coco_features_are_float32(f), f.facts["coco_feat_dtype"] == "torch.float32"),
    "flickr_feat_dtype": lambda f: (flickr_features(f) == f.facts["flickr_feat_dtype"]) or pytest.fail("another type"),
    "files": lambda f: [f.coco.features(f.image_id), f.coco.positions(f.image_id)],  # found under these names
}


def position_aspects():
    for folder in folders_of("dsran_region_data"):
        facts = {case: one for case, one in read_json(folder / POSITION).items() if case != "note"}
        found = {(case, aspect) for case, one in facts.items() for aspect in one.keys() - {"image_id", "stored_dtype"}}
        found |= {tuple(name.split("/")) for name in arrays(folder / "position.npz")}
        yield from ((folder, case, aspect) for case, aspect in sorted(found) if aspect not in {"bbox", "cls_prob"})


@each("folder, case, aspect", list(position_aspects()))
def test_region_data(folder, case, aspect, tmp_path):
    assert aspect in POSITIONS, f"nothing tests {aspect!r}"
    POSITIONS[aspect](VlpFiles(folder, case, tmp_path))


# VSRN's data set.

DATASET = "dataset.json"


class ScanFiles:
    """The golden captions and images in SCAN's layout, read back, tokenised as the runtime would, and collated."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.facts, self.theirs = read_json(folder / DATASET), arrays(folder / "collated.npz")
        np.save(out / "test_ims.npy", self.theirs["test_ims"])
        (out / "test_caps.txt").write_text("".join(f"{row['caption']}\n" for row in self.facts["rows"]), "utf-8")
        save_tokenizer(treebank_tokenizer(self.facts["word2idx"]), out / "tokenizer.json")
        self.split = ScanSplit(out, "test")
        self.tokenizer = treebank_tokenizer(self.facts["word2idx"])
        self.token_ids = CaptionTokenizer(out / "tokenizer.json", WORD_OPTIONS).ids(self.split.captions)
        self.batch = collate(self.token_ids)
        labels, masks = caption_targets(torch.from_numpy(self.batch.token_ids), max_length=self.facts["max_len"])
        self.labels, self.masks = labels.numpy(), masks.numpy()

    def words(self, row: int) -> list[str]:
        text = self.tokenizer.normalizer.normalize_str(self.split.captions[row])
        return [word for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def place(self, row: int) -> int:
        """Where a caption stands after sorting."""
        return int(np.flatnonzero(self.batch.order == row)[0])


SCAN_ROWS = {
    "tokens": lambda f, row: f.words(row),
    "ids": lambda f, row: f.token_ids[row],
    "index": lambda _, row: row,
    "img_id": lambda f, row: f.split.caption_image[row],
    "caption_label": lambda f, row: f.labels[f.place(row)],
    "caption_mask": lambda f, row: f.masks[f.place(row)].astype(np.int64),
}
SCAN_ARRAYS = {
    "test_ims": lambda f: f.split.images,
    "images": lambda f: f.split.images[np.array(f.split.caption_image)[f.batch.order]],
    "targets": lambda f: f.batch.token_ids,
    "lengths": lambda f: f.batch.lengths,
    "ids": lambda f: f.batch.order,
    "labels": lambda f: f.labels,
    "masks": lambda f: f.masks,
}
SCAN = folders_of("vsrn_precomp_dataset")


@pytest.mark.parametrize("folder", SCAN, ids=lambda folder: folder.name)
def test_images_of_captions(folder, tmp_path):
    files = ScanFiles(folder, tmp_path)
    assert files.facts.keys() == {"max_len", "im_div", "word2idx", "rows", "tokeniser"}
    assert files.facts["tokeniser"].startswith("nltk word_tokenize(text, preserve_line=True)")
    assert files.split.caption_image == [row // files.facts["im_div"] for row in range(len(files.facts["rows"]))]


@each(
    "folder, case, aspect",
    [
        (folder, index, aspect)
        for folder in SCAN
        for index, row in enumerate(read_json(folder / DATASET)["rows"])
        for aspect in sorted(row.keys() - {"caption"})
    ],
)
def test_scan_caption(folder, case, aspect, tmp_path):
    assert aspect in SCAN_ROWS, f"nothing tests {aspect!r}"
    files = ScanFiles(folder, tmp_path)
    equal(SCAN_ROWS[aspect](files, case), files.facts["rows"][case][aspect])


@each("folder, aspect", [(folder, name) for folder in SCAN for name in sorted(arrays(folder / "collated.npz"))])
def test_scan_batch(folder, aspect, tmp_path):
    assert aspect in SCAN_ARRAYS, f"nothing tests {aspect!r}"
    files = ScanFiles(folder, tmp_path)
    assert SCAN_ARRAYS[aspect](files).dtype == files.theirs[aspect].dtype
    equal(SCAN_ARRAYS[aspect](files), files.theirs[aspect])


# GloVe initialisation of DSRAN-GRU.

GLOVE = [folder for folder in folders_of("dsran_gru") if any(folder.glob("glove_init.*"))]


@cache
def glove(folder: Path):
    return {**read_json(folder / "glove_init.json"), **arrays(folder / "glove_init.npz")}


def glove_file(folder: Path, out: Path) -> Path:
    golden = glove(folder)
    lines = (
        " ".join([word, *(f"{number:.9g}" for number in vector)])
        for word, vector in zip(golden["glove_words"], golden["glove_vectors"], strict=True)
    )
    (out / "glove.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return out / "glove.txt"


def check_rows(folder, path):
    weight = torch.zeros(glove(folder)["embed_weight_after_init"].shape)
    rows = initialise_from_glove(weight, glove(folder)["word2idx"], path)
    equal(rows, glove(folder)["rows_from_glove"])
    assert not weight[np.setdiff1d(np.arange(len(weight)), rows)].any()


def check_weight(folder, path):
    theirs = glove(folder)["embed_weight_after_init"]
    before = theirs.copy()
    before[glove(folder)["rows_from_glove"]] = 0  # elsewhere theirs is random, and must stay
    weight = torch.from_numpy(before)
    initialise_from_glove(weight, glove(folder)["word2idx"], path)
    equal(weight.numpy(), theirs)


def check_vectors(folder, path):
    golden = glove(folder)
    found = read_glove(path, golden["glove_words"], dim=golden["glove_vectors"].shape[1])
    equal(np.stack([found[word] for word in golden["glove_words"]]), golden["glove_vectors"])


GLOVE_ASPECTS = {
    "rows_from_glove": check_rows,
    "embed_weight_after_init": check_weight,
    "glove_vectors": check_vectors,
}


@each(
    "folder, aspect",
    [
        (folder, aspect)
        for folder in GLOVE
        for aspect in sorted(glove(folder).keys() - {"glove_words", "word2idx", "note"})
    ],
)
def test_glove_initialisation(folder, aspect, tmp_path):
    assert aspect in GLOVE_ASPECTS, f"nothing tests {aspect!r}"
    GLOVE_ASPECTS[aspect](folder, glove_file(folder, tmp_path))
