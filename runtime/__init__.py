"""The light runtime: bundles, encoders, galleries, similarity, re-ranking, recall, search. NumPy, Pillow and tokenizers; never torch.

Nothing here imports `models`, `training` or `export`. A backend's package is imported when a session is opened, in its own file.
The names below are the public ones.
"""

from .bundle import Bundle, load_bundle
from .encoders import ImageEncoder, TextEncoder
from .errors import DualmatchError
from .galleries import Gallery

__all__ = ["Bundle", "DualmatchError", "Gallery", "ImageEncoder", "TextEncoder", "load_bundle"]
