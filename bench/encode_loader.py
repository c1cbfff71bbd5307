"""The plain way to feed a model, to compare with: a torch `DataLoader` over photographs, as most scripts write it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from dualmatch.runtime.preprocess import Preprocess


class _Photographs(Dataset[torch.Tensor]):
    def __init__(self, preprocess: Preprocess, paths: list[str]) -> None:
        self.preprocess, self.paths = preprocess, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.preprocess(Path(self.paths[index]).read_bytes()))


def loader_batches(
    preprocess: Preprocess, paths: list[str], *, batch_size: int, workers: int
) -> Iterator[NDArray[np.float32]]:
    """Pixels (batch, 3, S, S) in the order of `paths`; `workers` processes prepare them, 0 for none."""
    loader: Any = DataLoader(_Photographs(preprocess, paths), batch_size=batch_size, num_workers=workers)
    for batch in loader:
        yield batch.numpy()
