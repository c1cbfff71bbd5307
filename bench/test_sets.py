"""Is a data set one of those that the papers print tables of? Told by layout, name, split and counts; a doubt is a no, with its reason."""

from collections.abc import Mapping
from typing import Any

FLICKR30K, COCO_1K, COCO_5K = "Flickr30K", "COCO 1K", "COCO 5K"

# Layout and name: the authors' data set, its test split there, and how many images that has. VSE++'s folder has a name of the user's.
_FLICKR30K, _COCO = ("Flickr30K", 1000), ("COCO", 5000)
_KNOWN = {
    ("karpathy", "flickr30k"): (*_FLICKR30K, "test"),
    ("karpathy", "coco"): (*_COCO, "test"),
    ("scan", "f30k_precomp"): (*_FLICKR30K, "test"),
    ("scan", "coco_precomp"): (*_COCO, "testall"),
    ("vsepp", ""): (*_COCO, "test"),
}
_CAPTIONS_PER_IMAGE = 5


def recognised(data: Mapping[str, Any], protocol: str) -> tuple[str | None, str]:
    """The papers' test set that an evaluation was made on, or None and why it is none.

    Args:
        data: see `runtime.subject.about_data`.
        protocol: a key of `recall.FOLDS`.
    """
    name, layout = str(data["name"]), str(data["layout"])
    known = _KNOWN.get((layout, "" if layout == "vsepp" else name))
    if known is None:
        where = "; SCAN's folders are told by their names, f30k_precomp and coco_precomp" if layout == "scan" else ""
        return None, f"{name} is not Flickr30K or COCO (as the layouts of Karpathy, VSE++ and SCAN hold them{where})"
    which, images, split = known
    if list(data["splits"]) != [split]:
        return None, f"split {', '.join(data['splits'])} of {which}: the papers test on {split} alone"
    if data["images"] != images:
        return None, f"{data['images']} images of {which}'s {split}: the papers rank {images}"
    if data["captions"] != images * _CAPTIONS_PER_IMAGE:
        return None, (
            f"{data['captions']} captions of {which}'s {split}: the papers rank {images * _CAPTIONS_PER_IMAGE}, five an image, "
            "as VSE++'s and SCAN's files hold them"
        )
    if which == "COCO":
        return (COCO_5K if protocol == "full" else COCO_1K), ""
    if protocol != "full":
        return None, "Flickr30K in five folds: the papers rank its 1000 images together"
    return FLICKR30K, ""
