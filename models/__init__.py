"""The networks, as `nn.Module`s that read from top to bottom, and the frozen dataclasses that configure them.

Imports torch and transformers; imported by `training` and `export`, never by `runtime`.
Start with `dsran.py`, which uses everything else here.
"""

from .authors import from_authors
from .config import DsranConfig, RegionConfig, TextConfig, TrunkConfig
from .dsran import DSRAN, ImageEncoder, TextEncoder
from .vsrn import VSRN
from .vsrn_config import VsrnConfig

__all__ = [
    "DSRAN",
    "VSRN",
    "DsranConfig",
    "ImageEncoder",
    "RegionConfig",
    "TextConfig",
    "TextEncoder",
    "TrunkConfig",
    "VsrnConfig",
    "from_authors",
]
