"""Networks of the papers' size, ResNet-152 included: weights are generated from their names by the goldens' recipe, results compared.

A case is `<name>.json` (seed, inputs) with `<name>.npz` (captions, and what the authors' code computed) and `keys_<name>.json` (tensors).
"""

import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dualmatch.models import DSRAN
from dualmatch.models.authors import dsran_from_authors, vsrn_from_authors
from dualmatch.models.authors_dsran import DsranNames
from dualmatch.models.authors_vsrn import authors_states
from dualmatch.training.loss import hinge_loss

from .cases import folders_of, read_json

torch.set_num_threads(1)

INPUTS = ("captions", "lengths")
# Our names of the inputs that are generated.
OURS = {"image": "pixels", "regions": "regions", "img_pos": "region_positions"}


def generated(name: str, shape: list[int], seed: int) -> np.ndarray:
    """A tensor of a checkpoint, by RECIPE.txt."""
    chance = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    if name.endswith("num_batches_tracked"):
        return np.array(7)
    if name.endswith("running_mean"):
        values = 0.1 * chance.standard_normal(shape)
    elif name.endswith("running_var"):
        values = 0.5 + chance.random_sample(shape)
    elif len(shape) == 1 and name.endswith("weight"):
        scale = 0.2 if name.endswith("bn3.weight") else 0.02 if name.endswith("W.1.weight") else 1.0
        values = scale * (1 + 0.1 * chance.standard_normal(shape))
    elif len(shape) == 1:
        values = 0.05 * chance.standard_normal(shape)
    else:
        values = chance.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return np.asarray(values).astype(np.float32)


@dataclass(frozen=True, eq=False)
class FullSize:
    """A case, and what our network computes for it."""

    folder: Path
    name: str

    def __str__(self) -> str:
        return f"{self.folder.name}-{self.name}"

    @cached_property
    def facts(self) -> dict[str, Any]:
        return read_json(self.folder / f"{self.name}.json")

    @cached_property
    def theirs(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{self.name}.npz", allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    @property
    def results(self) -> list[str]:
        return [name for name in self.theirs if name not in INPUTS]

    def state(self, part: str, prefix: str = "") -> dict[str, Tensor]:
        shapes = read_json(self.folder / f"keys_{self.name}.json")[part]
        seed = self.facts["SEED"]
        return {
            name: torch.from_numpy(generated(prefix + name, entry["shape"], seed)) for name, entry in shapes.items()
        }

    def inputs(self) -> dict[str, Tensor]:
        found = {}
        for name, shape in self.facts["inputs"].items():
            chance = np.random.RandomState((zlib.crc32(f"input/{name}".encode()) + self.facts["SEED"]) % 2**32)
            values = torch.from_numpy(chance.standard_normal(shape).astype(np.float32))
            found[OURS[name]] = values.clamp(min=0) if name == "regions" else values
        return found

    @cached_property
    def evaluated(self) -> dict[str, Tensor]:
        """Our value of every result; the network itself is let go, for it is large."""
        return self._dsran() if self.name.startswith("dsran") else self._vsrn()

    def _dsran(self) -> dict[str, Tensor]:
        model = dsran_from_authors(self.facts.get("opt", {}), self.state("state_dict"), source=str(self))
        variant, joint_graphs = model.config.text.encoder, model.config.joint_graphs
        places = DsranNames(variant=variant, joint_graphs=joint_graphs).modules
        values: dict[str, Tensor] = {}
        for name in self.results:
            _watch(model, places, name, values)
        with torch.no_grad():
            inputs = {name: value for name, value in self.inputs().items() if name in model.image_encoder.input_names}
            images = model.image_encoder(**inputs)
            captions = model.text_encoder(torch.from_numpy(self.theirs["captions"]))
        return {**values, **self._outputs(images, captions)}

    def _vsrn(self) -> dict[str, Tensor]:
        states = (self.state("model[0]", "0."), self.state("model[1]", "1."))
        model = vsrn_from_authors({"data_name": self.facts["data_name"]}, states, source=str(self))
        with torch.no_grad():
            related = model.image_encoder.relate(self.inputs()["regions"])
            images = model.image_encoder.summarise(related)
            captions = model.text_encoder(torch.from_numpy(self.theirs["captions"]))
        return {"GCN_img_emd_first4": related[:, :4], **self._outputs(images, captions)}

    def _outputs(self, images: Tensor, captions: Tensor) -> dict[str, Tensor]:
        values = {"img_emb": images, "cap_emb": captions}
        for name in self.results:
            if margin := re.fullmatch(r"loss_margin_(\d+)_(\d+)", name):
                values[name] = hinge_loss(images @ captions.T, margin=float(f"{margin[1]}.{margin[2]}"))
        return values


def _watch(model: DSRAN, places: dict[str, str], name: str, values: dict[str, Tensor]) -> None:
    """Keep what stands at the place in our network that the authors' result `name` is taken from in theirs."""
    if trunk := re.fullmatch(r"resnet_layer(\d)_(b0_first64ch|mean_std)", name):
        stage = model.get_submodule(f"image_encoder.trunk.resnet.encoder.stages.{int(trunk[1]) - 1}")

        def keep_map(_: nn.Module, __: Any, result: Tensor) -> None:
            both = torch.stack([result.mean(), result.std()])
            values[name] = both if trunk[2] == "mean_std" else result[0, :64].clone()

        stage.register_forward_hook(keep_map)
        return
    module, first = re.fullmatch(r"(.+?)(?:_first(\d+)|_seq)?", name).groups()  # type: ignore[union-attr]

    def keep(value: Tensor) -> None:
        values[name] = value[:, : int(first)].clone() if first else value

    if module == "txt_enc":  # the words as the caption graph gets them
        model.text_encoder.caption_graph.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
    elif module in places:
        model.get_submodule(places[module]).register_forward_hook(lambda *call: keep(call[2]))


FOLDERS = folders_of("full_size")
CASES = [FullSize(folder, path.stem) for folder in FOLDERS for path in sorted(folder.glob("*.npz"))]
RESULTS = [(case, name) for case in CASES for name in case.results]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_no_file_is_passed_over(folder):
    names = {case.name for case in CASES if case.folder == folder}
    assert all(name.startswith(("dsran_gru", "dsran_bert", "vsrn")) for name in names), names
    cases = {f"{name}{kind}" for name in names for kind in (".json", ".npz")} | {f"keys_{name}.json" for name in names}
    others = {path.name for path in folder.iterdir()} - cases
    listings = {name for name in others if re.fullmatch(r"keys_(dsran|vsrn).*\.json", name)}
    assert others - listings <= {"checkpoint_structure.json", "RECIPE.txt"}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), RESULTS, ids=str)
def test_the_authors_result(case, name):
    assert name in case.evaluated, f"nothing of ours stands for {name}"
    ours, theirs = case.evaluated[name].numpy(), case.theirs[name]
    assert ours.shape == theirs.shape
    relative = 1e-4 * float(np.abs(theirs).max())
    allowed = 2e-5 if name in ("img_emb", "cap_emb") else 1e-4 if name.startswith("loss") else relative
    error = float(np.abs(ours - theirs).max())
    assert error <= allowed, f"differs by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize(
    "listing",
    [path for folder in FOLDERS for path in sorted(folder.glob("keys_vsrn*.json"))],
    ids=lambda path: path.stem,
)
def test_every_name_and_shape_of_a_vsrn_checkpoint(listing):
    """Nothing is computed: the tensors have shapes only. DSRAN's listings are with its checkpoints."""
    entries = read_json(listing)
    with torch.device("meta"):
        states = tuple(
            {name: torch.empty(entry["shape"]) for name, entry in entries[f"model[{index}]"].items()}
            for index in range(2)
        )
        data_name = "f30k_precomp" if "bn.weight" in states[0] else "coco_precomp"
        again = authors_states(vsrn_from_authors({"data_name": data_name}, states, source=str(listing)))
    for ours, theirs in zip(again, states, strict=True):
        assert {name: value.shape for name, value in ours.items()} == {
            name: value.shape for name, value in theirs.items()
        }
