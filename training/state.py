"""What training changes: weights, optimiser, schedule, moving average, and which epoch was best."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from dualmatch.models import DSRAN

from .checkpoint import frozen_names, load_state, load_tensors, save_tensors
from .recipe import Recipe


class TrainingState:
    """Weights in training, optimiser, schedule, moving average, and which epoch was best."""

    def __init__(self, recipe: Recipe, model: DSRAN, *, steps_per_epoch: int) -> None:
        self.options = recipe.train
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimiser = _optimiser(recipe, self.parameters)
        self.steps_per_epoch = steps_per_epoch
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if recipe.train.average else {}
        self.steps = 0
        self.epoch = 0
        self.best_epoch, self.best_rsum, self.is_best = 0, -math.inf, False

    @property
    def learning_rate(self) -> float:
        """The rate of the step to come."""
        options = self.options
        total = options.epochs * self.steps_per_epoch
        rising = round(options.warmup * total)
        if self.steps < rising:
            return options.learning_rate * (self.steps + 1) / rising
        if options.schedule == "cosine":
            done = (self.steps - rising) / max(1, total - rising)
            return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if options.schedule == "step":
            return options.learning_rate * 0.1 ** float(self.steps // self.steps_per_epoch // options.step_epochs)
        return options.learning_rate

    def step(self, loss: Tensor) -> None:
        """One update."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.options.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.options.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * group["factor"]
        self.optimiser.step()
        self.steps += 1
        for name, value in self.average.items():
            value.lerp_(self.parameters[name].detach(), 1 - self.options.average)

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

    def save(self, path: Path) -> None:
        """Everything that the next epoch depends on."""
        tensors = {f"model.{name}": value for name, value in self.trained_tensors().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        name_of: dict[Tensor, str] = {parameter: name for name, parameter in self.parameters.items()}
        for parameter, entry in self.optimiser.state.items():
            tensors |= {f"optimiser.{name_of[parameter]}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        facts = {"epoch": self.epoch, "steps": self.steps, "best_epoch": self.best_epoch, "best_rsum": self.best_rsum}
        save_tensors(path, tensors, facts)

    def load(self, path: Path) -> None:
        """Continue from `save`.

        Raises:
            DualmatchError: the file is missing, damaged, or another network's.
        """
        tensors, facts = load_tensors(path)
        own = self.model.state_dict()
        frozen = {name: own[name] for name in frozen_names(self.model)}
        load_state(self.model, frozen | _under(tensors, "model."), str(path))
        for name, value in _under(tensors, "average.").items():
            self.average[name].copy_(value)
        for name, value in _under(tensors, "optimiser.").items():
            parameter, _, key = name.rpartition(".")
            self.optimiser.state[self.parameters[parameter]][key] = value
        self.epoch, self.steps = facts["epoch"], facts["steps"]
        self.best_epoch, self.best_rsum = facts["best_epoch"], facts["best_rsum"]


def _optimiser(recipe: Recipe, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Parameters in groups by learning rate and weight decay."""
    options = recipe.train
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        factor = options.graph_learning_rate if "graph" in name or ".fusions." in name else 1.0
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    described = [
        {"params": members, "factor": factor, "weight_decay": decay} for (factor, decay), members in groups.items()
    ]
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
