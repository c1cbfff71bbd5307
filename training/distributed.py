"""Several processes as one: started by torchrun, each computes its share of every batch, and the loss is that of the whole batch.

Embeddings are gathered, so that negatives come from all processes; every process computes the same loss, but its gradient only through
its own rows. The sum over processes is then the gradient of one process on the whole batch.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dualmatch.runtime.errors import DualmatchError

# One process computes features or validates while the others wait for it: that may take hours.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes that train together; one, if nothing else was started.

    Attributes:
        rank, size: this process and how many there are.
        local_rank: this process among those of its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    @contextmanager
    def one_per_machine_first(self) -> Iterator[None]:
        """What is inside runs in one process of each machine before it runs in the others: they find its caches."""
        if self.size > 1 and self.local_rank:
            dist.barrier()
        yield
        if self.size > 1 and not self.local_rank:
            dist.barrier()

    def gather(self, own_RD: Tensor, bounds: list[int]) -> Tensor:
        """Every process's rows, in the order of the processes; the gradient goes to one's own rows.

        Args:
            bounds: where each process's rows begin, and how many there are in all.
        """
        if self.size == 1:
            return own_RD
        counts = [end - start for start, end in itertools.pairwise(bounds)]
        assert counts[self.rank] == len(own_RD)
        # Equal shapes for all: not every transport gathers others.
        padded = torch.nn.functional.pad(own_RD.detach(), (0, 0, 0, max(counts) - len(own_RD))).contiguous()
        everyone = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(everyone, padded)
        rows = [part[:count] for part, count in zip(everyone, counts, strict=True)]
        rows[self.rank] = own_RD
        return torch.cat(rows)

    def collect(self, value: Any) -> list[Any]:
        """A small value of every process, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """The group that torchrun started this process in (by its environment variables); a group of one without it. One that was
    initialised before is used and left as it is.

    Raises:
        DualmatchError: the variables are incomplete, or the other processes were not reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group()
        return
    started_here = not dist.is_initialized()
    try:
        group = Group(
            rank=int(os.environ["RANK"]), size=int(os.environ["WORLD_SIZE"]), local_rank=int(os.environ["LOCAL_RANK"])
        )
        if started_here:
            # NCCL moves GPU tensors, gloo the small values that processes agree on.
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (KeyError, ValueError, RuntimeError) as error:
        raise DualmatchError(f"the processes that torchrun started did not find each other ({error}).") from None
    try:
        yield group
    finally:
        if started_here:
            dist.destroy_process_group()


def device_named(name: str) -> torch.device:
    """`cpu`, or this process's GPU for `cuda`.

    Raises:
        DualmatchError: there is no such device here.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DualmatchError(f"--device {name} was asked for, but this torch finds no GPU here; use --device cpu.")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise DualmatchError(
            f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; start as many processes."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
