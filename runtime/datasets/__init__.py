"""Data sets: images with captions, read from several layouts through one interface, or generated (`scenes`).

Torch-free, because `evaluate` and `verify` read the same data as training does. `open_dataset` is the door.
"""

from .base import Dataset, ImageItem
from .opening import open_dataset
from .scenes import make_scenes

__all__ = ["Dataset", "ImageItem", "make_scenes", "open_dataset"]
