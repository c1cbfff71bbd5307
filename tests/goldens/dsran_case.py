"""Runs a DSRAN case of the goldens through our network once, and keeps what the tests compare."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dualmatch.models import DSRAN
from dualmatch.models.authors import dsran_from_authors
from dualmatch.models.authors_dsran import DsranNames
from dualmatch.models.pooling import l2_normalise, mean_over_nodes
from dualmatch.training.bert_adam import BertAdam
from dualmatch.training.loss import hinge_loss

torch.set_num_threads(1)


@dataclass(frozen=True, eq=False)
class DsranCase:
    """Inputs, the authors' tensors, and what ours computes from them."""

    folder: Path

    def __str__(self) -> str:
        return self.folder.name

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "opt.json").read_text(encoding="utf-8"))

    @cached_property
    def opt(self) -> dict[str, Any]:
        return self.facts["opt"]

    @cached_property
    def theirs(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "io.npz", allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return load_file(self.folder / "state.safetensors")

    @cached_property
    def names(self) -> DsranNames:
        return DsranNames(variant=self.facts["kind"], joint_graphs=self.opt["K"])

    def input(self, name: str) -> Tensor | None:
        return torch.from_numpy(self.theirs[f"in/{name}"]) if f"in/{name}" in self.theirs else None

    def ours(self, authors_name: str) -> str:
        return self.names.ours_from_authors(authors_name.removeprefix("module."))

    def network(self) -> DSRAN:
        bert = self.facts["bert_config"] or {}
        return dsran_from_authors(
            self.opt, self.state, source=str(self.folder), num_bert_heads=bert.get("num_attention_heads")
        )

    def embed(self, model: DSRAN) -> tuple[Tensor, Tensor]:
        images = model.image_encoder.embed(
            {"final": self.input("grid_map")}, self.input("regions"), self.input("img_pos")
        )
        return images, model.text_encoder(self.input("captions"))

    @cached_property
    def evaluated(self) -> dict[str, Tensor]:
        """Everything under mid/ and out/ that our modules compute, by the authors' names."""
        model = self.network()
        values: dict[str, Tensor] = {}
        for name in self.theirs:
            if name.startswith("mid/"):
                self._watch(model, name.removeprefix("mid/"), values)
        with torch.no_grad():
            images, captions = self.embed(model)
            alone = [
                model.text_encoder(caption[None, :length] if self.names.variant == "gru" else caption[None])
                for caption, length in zip(self.input("captions"), self.input("lengths"), strict=True)
            ]
        values |= {"out/img_emb": images, "out/cap_emb": captions, "out/sims": images @ captions.T}
        return {**values, "out/cap_emb_batch_of_one_unpadded": torch.cat(alone)}

    def _watch(self, model: DSRAN, name: str, values: dict[str, Tensor]) -> None:
        """Keep what stands at the place in our network that the authors' module `name` has in theirs; nothing, where there is none."""
        key = f"mid/{name}"

        def keep(value: Tensor) -> None:
            values.setdefault(key, value)  # the first call: later ones are captions alone

        places: dict[str, str] = {"img_enc": "image_encoder.grid", "rcnn_enc": "image_encoder.regions"}
        if self.names.variant == "bert":
            places |= {
                "rcnn_enc.fc_image": "image_encoder.regions.project",
                "rcnn_enc.fc_pos": "image_encoder.regions.position",
            }
        places |= {theirs: ours for theirs, ours in self.names.modules.items() if theirs not in places}
        if name in ("txt_enc", "txt_enc.0"):  # the words as the caption graph gets them
            module = model.text_encoder.caption_graph
            module.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
        elif name == "txt_enc.1":  # their GRU's mean of words, which nothing uses
            module = model.text_encoder.caption_graph
            module.register_forward_pre_hook(lambda _, inputs: keep(l2_normalise(mean_over_nodes(inputs[0], None), 0)))
        elif name.endswith(".mha"):  # the heads side by side, before W_o
            module = model.get_submodule(places[name.removesuffix("mha") + "fc_in"])
            module.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
        elif name in places or name.startswith("txt_enc.bert."):
            ours = places.get(name) or name.replace("txt_enc.bert.", "text_encoder.words.bert.", 1)
            module = model.get_submodule(ours)
            module.register_forward_hook(lambda *call: keep(call[2][0] if isinstance(call[2], tuple) else call[2]))

    @cached_property
    def trained(self) -> "Trained":
        """The authors' training step, as often as theirs ran, all dropout off."""
        model = self.network().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimiser: torch.optim.Optimizer
        rate = self.opt["learning_rate"]
        if self.names.variant == "gru":
            optimiser = torch.optim.Adam(model.parameters(), lr=rate)
        else:
            total_steps = self.opt["l_train"] * self.opt["num_epochs"]
            optimiser = BertAdam(model.parameters(), lr=rate, total_steps=total_steps, warmup=self.opt["warmup"])
        losses: list[float] = []
        gradients: dict[str, Tensor] = {}
        for _ in self.theirs["train/losses"]:
            images, captions = self.embed(model)
            loss = hinge_loss(images @ captions.T, margin=self.opt["margin"])
            optimiser.zero_grad()
            loss.backward()
            if self.names.variant == "gru":
                nn.utils.clip_grad_norm_(model.parameters(), self.opt["grad_clip"])
            optimiser.step()  # BertAdam clips here
            losses.append(loss.item())
            gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return Trained(losses=losses, gradients=gradients, after=model.state_dict())


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    gradients: dict[str, Tensor]  # of the first step, clipped
    after: dict[str, Tensor]
