"""Runs a VSRN case of the goldens through our network and captioning branch once, and keeps what the tests compare."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dualmatch.models import VSRN
from dualmatch.models.authors import vsrn_from_authors
from dualmatch.models.authors_vsrn import (
    captioner_ours_from_authors,
    load_captioner,
    modules,
    ours_from_authors,
)
from dualmatch.models.vsrn_caption import Captioner
from dualmatch.training.loss import hinge_loss

torch.set_num_threads(1)

CAPTIONER = "caption_model."
ATTENTION = "mid/caption_model.decoder.attention(last step)"


@dataclass(frozen=True, eq=False)
class VsrnCase:
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
    def states(self) -> tuple[dict[str, Tensor], ...]:
        return tuple(load_file(self.folder / f"state_{index}.safetensors") for index in range(2))

    @cached_property
    def captioner_state(self) -> dict[str, Tensor]:
        return load_file(self.folder / "caption_model.safetensors")

    def input(self, name: str) -> Tensor:
        return torch.from_numpy(self.theirs[f"in/{name}"])

    def network(self) -> VSRN:
        return vsrn_from_authors(self.opt, self.states, source=str(self.folder))

    def captioner(self) -> Captioner:
        config = self.network().config
        captioner = Captioner(
            config.captioning, feature_dim=config.embed_dim, vocabulary_size=config.text.vocabulary_size
        )
        load_captioner(captioner, self.captioner_state)
        return captioner.eval()

    @cached_property
    def evaluated(self) -> dict[str, Tensor]:
        """Everything under mid/, out/ and caption/ that our modules compute, by the authors' names and in their shapes."""
        model, captioner = self.network(), self.captioner()
        values: dict[str, Tensor] = {}
        for name in self.theirs:
            if name.startswith("mid/"):
                self._watch(model, captioner, name, values)
        regions, token_ids = self.input("regions"), self.input("captions")
        with torch.no_grad():
            related = model.image_encoder.relate(regions)
            images, captions = model.image_encoder.summarise(related), model.text_encoder(token_ids)
            values |= {
                "out/img_emb": images,
                "out/cap_emb": captions,
                "out/GCN_img_emd": related,
                "out/sims": model.similarity(images, captions),
                "out/img_emb_batch_of_one": torch.cat([model.image_encoder(image[None]) for image in regions]),
                "out/cap_emb_batch_of_one_unpadded": torch.cat(
                    [
                        model.text_encoder(caption[None, :length])
                        for caption, length in zip(token_ids, self.input("lengths"), strict=True)
                    ]
                ),
            }
            labels, mask = self.input("caption_labels"), self.input("caption_masks")
            values["caption/logprobs_teacher_forced"] = captioner(related, labels[:, : self.opt["max_len"] - 1])
            values["caption/loss_eval_mode"] = captioner.loss(related, labels, mask)
            greedy = captioner.decode_greedily(related)
            values |= dict(zip(("caption/greedy_ids", "caption/greedy_logprobs"), greedy, strict=True))
        return values

    def _watch(self, model: VSRN, captioner: Captioner, key: str, values: dict[str, Tensor]) -> None:
        """Keep what stands at the place in our networks that the authors' module has in theirs; nothing, where there is none."""
        name = key.removeprefix("mid/").removesuffix("(last step)")
        if name not in self._places and name[-2:] in (".0", ".1"):  # one of a module's two outputs
            name, _, output = name.rpartition(".")
        else:
            output = ""
        place = self._places.get(name)
        if place is None:
            return
        # Their relation layers have channels before regions.
        turned = ".Rs_GCN_" in key
        attention = key == ATTENTION

        def keep(_: nn.Module, __: Any, result: Any) -> None:
            value = result[int(output)] if output else result
            value = value.transpose(1, 2) if turned else value
            if attention:  # the last step of teacher forcing: the first max_len - 1 of all calls
                values[f"{key}#"] = values.get(f"{key}#", torch.tensor(0)) + 1
                if values[f"{key}#"] == self.opt["max_len"] - 1:
                    values[key] = value
            else:
                values.setdefault(key, value)  # the first call: later ones are items alone

        network = captioner if name.startswith(CAPTIONER) else model
        network.get_submodule(place).register_forward_hook(keep)

    @cached_property
    def _places(self) -> dict[str, str]:
        captioner = {"encoder": "encoder", "decoder.attention": "decoder.attention"}
        for name in self.captioner_state:
            captioner[name.rpartition(".")[0]] = captioner_ours_from_authors(name).rpartition(".")[0]
        own = modules(self.network().config.num_relation_layers)
        return {**own, **{CAPTIONER + theirs: ours for theirs, ours in captioner.items()}}

    def ours(self, authors_name: str) -> str:
        """The name under which `trained` keeps the gradient of the authors' tensor."""
        if authors_name.startswith(CAPTIONER):
            return CAPTIONER + captioner_ours_from_authors(authors_name.removeprefix(CAPTIONER))
        return ours_from_authors(authors_name, self.network().config.num_relation_layers)

    @cached_property
    def trained(self) -> "Trained":
        """Losses and gradients of the authors' training step, all dropout off, before clipping.

        In float64: BatchNorm in training and the norms over regions make float32 gradients differ in the fourth digit from one way of
        summing to another, so that only the authors' own rounding is left in the comparison.
        """
        model, captioner = self.network().double().train(), self.captioner().double().train()
        for module in (*model.modules(), *captioner.modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        related = model.image_encoder.relate(self.input("regions").double())
        scores = model.similarity(model.image_encoder.summarise(related), model.text_encoder(self.input("captions")))
        retrieval = hinge_loss(scores, margin=self.opt["margin"], hardest=self.opt["max_violation"])
        caption = captioner.loss(related, self.input("caption_labels"), self.input("caption_masks").double())
        (retrieval + caption).backward()
        named = [*model.named_parameters(), *((CAPTIONER + n, p) for n, p in captioner.named_parameters())]
        return Trained(
            losses={"retrieval_loss": retrieval, "caption_loss": caption},
            gradients={name: parameter.grad for name, parameter in named if parameter.grad is not None},
        )


@dataclass(frozen=True)
class Trained:
    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]
