"""The authors' checkpoints as our networks: the one place where their files, options and tensor names enter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dualmatch.runtime.errors import DualmatchError

from . import authors_vsrn
from .authors_dsran import DsranNames, config_from_authors, joint_graphs_of, variant_of
from .authors_files import read_torch_file
from .dsran import DSRAN
from .trunks import ResNet152
from .vsrn import VSRN

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AuthorsCheckpoint:
    """What a `*.pth.tar` of the authors holds.

    Attributes:
        opt: their training options.
        states: state dicts without the `module.` of DataParallel: one for DSRAN, two for VSRN (images, captions).
        epoch: finished epochs.
        best_rsum: the best validation sum of recalls so far.
    """

    opt: dict[str, Any]
    states: tuple[dict[str, Tensor], ...]
    epoch: int
    best_rsum: float


def read_checkpoint(path: Path) -> AuthorsCheckpoint:
    """Read a checkpoint without executing anything.

    Raises:
        DualmatchError: no such file, one that holds more than data, or one that is no checkpoint of the authors.
    """
    values = read_torch_file(path)
    missing = [
        key for key in ("epoch", "model", "best_rsum", "opt") if not isinstance(values, dict) or key not in values
    ]
    if missing:
        raise DualmatchError(f"{path} is no checkpoint of the authors: it lacks {', '.join(missing)}.")
    model = values["model"]
    states = tuple(model) if isinstance(model, list) else (model,)
    for state in states:
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
        ):
            raise DualmatchError(f"{path} is no checkpoint of the authors: its model is not made of named tensors.")
    return AuthorsCheckpoint(
        opt=dict(vars(values["opt"])),
        states=tuple(_without_module(state) for state in states),
        epoch=int(values["epoch"]),
        best_rsum=float(values["best_rsum"]),
    )


def from_authors(path: Path, *, num_bert_heads: int | None = None) -> DSRAN | VSRN:
    """The network of an authors' checkpoint, in evaluation mode, float32, its trunk included where the file holds one.

    Args:
        num_bert_heads: see `config_from_authors`.

    Raises:
        DualmatchError: the file cannot be read, is neither a DSRAN nor a VSRN, or lacks a tensor.
    """
    return network_from_authors(read_checkpoint(path), source=str(path), num_bert_heads=num_bert_heads)


def network_from_authors(
    checkpoint: AuthorsCheckpoint, *, source: str, num_bert_heads: int | None = None
) -> DSRAN | VSRN:
    """As `from_authors`, from a checkpoint that was read.

    Raises:
        DualmatchError: see `from_authors`; messages begin with `source`.
    """
    if len(checkpoint.states) == 2:
        return vsrn_from_authors(checkpoint.opt, checkpoint.states, source=source)
    if len(checkpoint.states) != 1:
        raise DualmatchError(
            f"{source} holds {len(checkpoint.states)} state dicts; a DSRAN checkpoint holds one, a VSRN checkpoint two."
        )
    return dsran_from_authors(checkpoint.opt, checkpoint.states[0], source=source, num_bert_heads=num_bert_heads)


def dsran_from_authors(
    opt: Mapping[str, Any], state: State, *, source: str, num_bert_heads: int | None = None
) -> DSRAN:
    """As `from_authors`, from options and tensors in memory; `module.` before names is accepted.

    Raises:
        DualmatchError: see `from_authors`; messages begin with `source`.
    """
    state = _without_module(state)
    try:
        config = config_from_authors(opt, state, num_bert_heads=num_bert_heads)
        names = DsranNames(variant=variant_of(state), joint_graphs=joint_graphs_of(state))
        renamed = {names.ours_from_authors(name): value for name, value in state.items() if not names.is_unused(name)}
        # The trunk is the checkpoint's own: its BatchNorm statistics went on moving in the authors' training.
        model = DSRAN(config, ResNet152() if config.trunk.feature_dim == 0 else None)
        _load(model, renamed, names.authors_from_ours)
    except DualmatchError as error:
        raise DualmatchError(f"{source}: {error}") from None
    return model.eval()


def vsrn_from_authors(opt: Mapping[str, Any], states: tuple[State, ...], *, source: str) -> VSRN:
    """As `from_authors`, from options and the two state dicts in memory, images first; `module.` before names is accepted.

    Raises:
        DualmatchError: see `from_authors`; messages begin with `source`.
    """
    states = tuple(_without_module(state) for state in states)
    try:
        model = VSRN(authors_vsrn.config_from_authors(opt, states))
        num_layers = model.config.num_relation_layers
        _load(model, authors_vsrn.renamed(states, model), lambda n: authors_vsrn.authors_from_ours(n, num_layers))
    except DualmatchError as error:
        raise DualmatchError(f"{source}: {error}") from None
    return model.eval()


def unused_names(state: State) -> list[str]:
    """The authors' names of the tensors that `from_authors` leaves out, because their forward pass never reads them."""
    state = _without_module(state)
    names = DsranNames(variant=variant_of(state), joint_graphs=joint_graphs_of(state))
    return [name for name in state if names.is_unused(name)]


def _without_module(state: State) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in state.items()}


def _load(model: nn.Module, state: State, authors_name: Callable[[str], str]) -> None:
    own = model.state_dict()
    # BatchNorm's counters came with PyTorch 0.4.1 and enter no result.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        raise DualmatchError(f"the checkpoint lacks {len(missing)} tensors, the first {authors_name(missing[0])!r}.")
    for name, value in state.items():
        if name not in own:
            raise DualmatchError(f"the checkpoint holds {authors_name(name)!r}, which the network has not.")
        if value.shape != own[name].shape:
            raise DualmatchError(
                f"the tensor {authors_name(name)!r} has shape {list(value.shape)}, the network needs {list(own[name].shape)}."
            )
    model.load_state_dict(state, strict=False)
