"""torch against a graph's file, for the tests that compare them outside export's gate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dualmatch.runtime.backends import open_session


def largest_difference(encoder: nn.Module, path: Path, batches: Sequence[Mapping[str, Any]]) -> float:
    """Run torch and the graph on each batch; the largest absolute difference of a component."""
    worst = 0.0
    with open_session(path) as session, torch.inference_mode():
        for feeds in batches:
            wanted = encoder(**{name: torch.from_numpy(value) for name, value in feeds.items()}).numpy()
            (got,) = session.run(feeds).values()
            assert np.isfinite(wanted).all()  # max() would pass over NaN
            assert got.shape == wanted.shape
            worst = max(worst, float(np.abs(got - wanted).max()))
    return worst
