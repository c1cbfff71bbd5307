"""Galleries on disk: sources read, encoded, stored shard by shard (`writer`, `store`, `index`), opened and searched (`gallery`).

Imports the rest of `runtime`, which imports nothing from here but `Gallery`.
"""

from .gallery import Gallery

__all__ = ["Gallery"]
