"""What training changes: weights, optimiser, schedule, moving average, and which epoch was best."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualmatch.runtime.errors import DualmatchError

from .bert_adam import BertAdam, warmup_linear
from .checkpoint import frozen_names, load_state, load_tensors, save_tensors
from .objective import Objective
from .recipe import Recipe


@dataclass(kw_only=True)
class Unfinished:
    """How far an unfinished epoch has come.

    Attributes:
        losses: of its steps so far.
        seconds: that they took.
        rng: the state of every process's generators.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rng: list[dict[str, Tensor]] = field(default_factory=list)


class TrainingState:
    """Weights in training, optimiser, schedule, moving average, and which epoch was best."""

    def __init__(self, recipe: Recipe, objective: Objective, *, steps_per_epoch: int) -> None:
        self.options = recipe.train
        self.model, self.captioner = objective.model, objective.captioner
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.captioner is not None:
            self.parameters |= {f"captioner.{name}": p for name, p in self.captioner.named_parameters()}
        self.optimiser = _optimiser(recipe, self.parameters, total_steps=recipe.train.epochs * steps_per_epoch)
        device = next(self.model.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.train.precision == "fp16")
        self.steps_per_epoch = steps_per_epoch
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if recipe.train.average else {}
        self.steps = 0
        self.epoch = 0
        self.best_epoch, self.best_rsum, self.is_best = 0, -math.inf, False

    @property
    def learning_rate(self) -> float:
        """The rate of the step to come."""
        if self.options.optimiser == "bertadam":
            done = self.steps / (self.options.epochs * self.steps_per_epoch)
            return self._scheduled * warmup_linear(done, self.options.warmup)
        return self._scheduled

    @property
    def _scheduled(self) -> float:
        """That rate as the optimiser takes it: BertAdam brings warm-up and linear decay itself."""
        options = self.options
        total = options.epochs * self.steps_per_epoch
        rising = 0 if options.optimiser == "bertadam" else round(options.warmup * total)
        if self.steps < rising:
            return options.learning_rate * (self.steps + 1) / rising
        if options.schedule == "cosine":
            done = (self.steps - rising) / max(1, total - rising)
            return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if options.schedule == "step":
            return options.learning_rate * 0.1 ** float(self.steps // self.steps_per_epoch // options.step_epochs)
        return options.learning_rate

    def step(self) -> float:
        """One update with the gradients that were added since the last; their norm before clipping.

        Where the norm is not finite nothing is updated: with fp16 the scaler lowers its scale, otherwise the step is not counted.
        """
        self.scaler.unscale_(self.optimiser)
        per_tensor = self.options.optimiser == "bertadam"  # it clips each tensor itself
        limit = math.inf if per_tensor else self.options.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        if not norm.isfinite() and not self.scaler.is_enabled():
            return norm.item()
        for group in self.optimiser.param_groups:
            group["lr"] = self._scheduled * group["factor"]
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.steps += 1
        for name, value in self.average.items():
            value.lerp_(self.parameters[name].detach(), 1 - self.options.average)
        return norm.item()

    @property
    def is_finite(self) -> bool:
        """Whether every weight is a number."""
        return all(bool(weights.isfinite().all()) for weights in self.parameters.values())

    def averaged(self) -> "_Swapped":
        """Within it, the model holds the averaged weights (its own, where there is no average)."""
        return _Swapped(self.parameters, self.average)

    def finish_epoch(self, rsum: float) -> None:
        """Count the epoch; a tie keeps the earlier one."""
        self.epoch += 1
        self.is_best = rsum > self.best_rsum
        if self.is_best:
            self.best_epoch, self.best_rsum = self.epoch, rsum

    def trained_tensors(self) -> dict[str, Tensor]:
        """The state dict without what is frozen."""
        frozen = frozen_names(self.model)
        return {name: value for name, value in self.model.state_dict().items() if name not in frozen}

    def save(self, path: Path, unfinished: Unfinished | None = None) -> None:
        """Everything that the next epoch, or the rest of this one, depends on."""
        tensors = {f"model.{name}": value for name, value in self.trained_tensors().items()}
        if self.captioner is not None:
            tensors |= {f"captioner.{name}": value for name, value in self.captioner.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        name_of: dict[Tensor, str] = {parameter: name for name, parameter in self.parameters.items()}
        for parameter, entry in self.optimiser.state.items():
            tensors |= {f"optimiser.{name_of[parameter]}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        facts: dict[str, Any] = {
            "epoch": self.epoch,
            "steps": self.steps,
            "best_epoch": self.best_epoch,
            "best_rsum": self.best_rsum,
        }
        if self.scaler.is_enabled():
            facts["scaler"] = self.scaler.state_dict()
        if unfinished is not None:
            facts["unfinished"] = {"losses": unfinished.losses, "seconds": unfinished.seconds}
            for rank, state in enumerate(unfinished.rng):
                tensors |= {f"rng.{rank}.{name}": value for name, value in state.items()}
        save_tensors(path, tensors, facts)

    def load(self, path: Path, *, processes: int = 1) -> Unfinished | None:
        """Continue from `save`; how far the epoch had come, where one was begun.

        Raises:
            DualmatchError: the file is missing, damaged, or another network's; or the epoch was begun by another number of processes.
        """
        tensors, facts = load_tensors(path)
        own = self.model.state_dict()
        frozen = {name: own[name] for name in frozen_names(self.model)}
        load_state(self.model, frozen | _under(tensors, "model."), str(path))
        if self.captioner is not None:
            load_state(self.captioner, _under(tensors, "captioner."), str(path))
        for name, value in _under(tensors, "average.").items():
            self.average[name].copy_(value)
        for name, value in _under(tensors, "optimiser.").items():
            parameter, _, key = name.rpartition(".")
            weights = self.parameters[parameter]
            # Adam counts its steps on the CPU wherever the weights are, BertAdam in a plain number.
            if key == "step":
                self.optimiser.state[weights][key] = (
                    int(value.item()) if isinstance(self.optimiser, BertAdam) else value
                )
            else:
                self.optimiser.state[weights][key] = value.to(weights.device)
        self.epoch, self.steps = facts["epoch"], facts["steps"]
        self.best_epoch, self.best_rsum = facts["best_epoch"], facts["best_rsum"]
        if "scaler" in facts:
            self.scaler.load_state_dict(facts["scaler"])
        if "unfinished" not in facts:
            return None
        rng = _under(tensors, "rng.")
        ranks = 1 + max(int(name.partition(".")[0]) for name in rng)
        if ranks != processes:
            raise DualmatchError(
                f"{path} was saved in the middle of an epoch that {ranks} processes had begun; {processes} cannot continue it exactly."
            )
        return Unfinished(rng=[_under(rng, f"{rank}.") for rank in range(ranks)], **facts["unfinished"])


def _optimiser(recipe: Recipe, parameters: dict[str, nn.Parameter], *, total_steps: int) -> torch.optim.Optimizer:
    """Parameters in groups by learning rate and weight decay."""
    options = recipe.train
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        factor = 1.0
        if name.startswith("text_encoder.words."):
            factor = options.word_learning_rate
        elif any(part in name for part in ("graph", ".fusions.", ".relations.")):
            factor = options.graph_learning_rate
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    described = [
        {"params": members, "factor": factor, "weight_decay": decay} for (factor, decay), members in groups.items()
    ]
    if options.optimiser == "bertadam":
        return BertAdam(
            described,
            lr=options.learning_rate,
            total_steps=total_steps,
            warmup=options.warmup,
            clip_norm=options.clip_norm,
        )
    optimiser = torch.optim.AdamW if options.optimiser == "adamw" else torch.optim.Adam
    return optimiser(described, lr=options.learning_rate)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class _Swapped:
    """Parameters hold other values inside the block."""

    def __init__(self, parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        self.parameters, self.values = parameters, values
        self.kept: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        with torch.no_grad():
            for name, value in self.values.items():
                self.kept[name] = self.parameters[name].detach().clone()
                self.parameters[name].copy_(value)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, value in self.kept.items():
                self.parameters[name].copy_(value)
