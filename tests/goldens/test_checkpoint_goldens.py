"""The authors' checkpoint files, in their own pickle format, against the case that each was saved from."""

import argparse
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dualmatch.models import from_authors
from dualmatch.models.authors import dsran_from_authors, read_checkpoint, unused_names
from dualmatch.models.authors_dsran import DsranNames, joint_graphs_of, variant_of
from dualmatch.models.authors_files import read_torch_file
from dualmatch.runtime.errors import DualmatchError

from .cases import folders_of, golden_folder, read_json
from .dsran_case import DsranCase

FILES = [path for folder in folders_of("checkpoints") for path in sorted(folder.iterdir())]
DSRAN = [path for path in FILES if path.name.startswith("dsran")]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
each_dsran = pytest.mark.parametrize("path", DSRAN, ids=lambda path: path.name)


def case_folder(path: Path) -> Path:
    folder = golden_folder() / path.name.removesuffix(".pth.tar")
    assert folder.is_dir(), f"{path} was saved from no case in {golden_folder()}: nothing to compare it with"
    return folder


@cache
def opened(path: Path):
    return read_checkpoint(path)


@each_file
def test_the_same_values_as_torch_reads(path):
    def same(ours, theirs):
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        elif isinstance(theirs, dict):
            assert list(ours) == list(theirs)
            for key in theirs:
                same(ours[key], theirs[key])
        elif isinstance(theirs, list | tuple):
            assert type(ours) is type(theirs)
            for one, other in zip(ours, theirs, strict=True):
                same(one, other)
        else:
            assert ours == theirs
            assert type(ours) is type(theirs)

    with torch.serialization.safe_globals([argparse.Namespace]):
        same(read_torch_file(path), torch.load(path, weights_only=True))


@each_file
def test_options(path):
    assert opened(path).opt == read_json(case_folder(path) / "opt.json")["opt"]
    assert opened(path).epoch >= 1


@each_file
def test_tensors(path):
    # VSRN's BatchNorm statistics had seen more batches when its checkpoint was saved than when its case was.
    moving = ("running_mean", "running_var", "num_batches_tracked") if path.name.startswith("vsrn") else ("no name",)
    files = sorted(case_folder(path).glob("state*.safetensors"))
    for state, file in zip(opened(path).states, files, strict=True):
        expected = {name.removeprefix("module."): value for name, value in load_file(file).items()}
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            if not name.endswith(moving):
                torch.testing.assert_close(state[name], value, rtol=0, atol=0)


@each_dsran
def test_embeddings_of_the_loaded_network(path):
    case = DsranCase(case_folder(path))
    heads = (case.facts["bert_config"] or {}).get("num_attention_heads")
    with torch.no_grad():
        images, captions = case.embed(from_authors(path, num_bert_heads=heads))
    assert np.abs(images.numpy() - case.theirs["out/img_emb"]).max() <= 2e-5
    assert np.abs(captions.numpy() - case.theirs["out/cap_emb"]).max() <= 2e-5


@each_dsran
def test_options_that_contradict_the_tensors(path, tmp_path):
    values = read_torch_file(path)
    values["opt"].K = {1: 2, 2: 4, 4: 1}[values["opt"].K]
    torch.save(values, tmp_path / "c.pth.tar")
    with pytest.raises(DualmatchError, match="options say K"):
        from_authors(tmp_path / "c.pth.tar")


@each_dsran
@pytest.mark.parametrize("prefix", ["", "module."])
def test_counters_may_be_missing_and_the_prefix_with_them(path, prefix, tmp_path):
    values = read_torch_file(path)
    case = DsranCase(case_folder(path))
    state = {
        prefix + name: value for name, value in opened(path).states[0].items() if not name.endswith("batches_tracked")
    }
    torch.save({**values, "model": state}, tmp_path / "c.pth.tar")
    heads = (case.facts["bert_config"] or {}).get("num_attention_heads")
    own = from_authors(path, num_bert_heads=heads).state_dict()
    for name, value in from_authors(tmp_path / "c.pth.tar", num_bert_heads=heads).state_dict().items():
        if not name.endswith("batches_tracked"):
            torch.testing.assert_close(value, own[name], rtol=0, atol=0)


@each_dsran
@pytest.mark.parametrize("change", ["missing", "unknown", "reshaped"])
def test_tensors_that_do_not_fit(path, change, tmp_path):
    values = read_torch_file(path)
    state = dict(opened(path).states[0])
    name = "gat_cap.encoder.0.fc_in.weight"
    if change == "missing":
        del state[name]
    else:
        state["gat_cap.fc" if change == "unknown" else name] = torch.zeros(3)
    torch.save({**values, "model": [state]}, tmp_path / "c.pth.tar")
    heads = (DsranCase(case_folder(path)).facts["bert_config"] or {}).get("num_attention_heads")
    with pytest.raises(DualmatchError, match=r"c\.pth\.tar: .*gat_cap\.(fc|encoder\.0\.fc_in\.weight)'"):
        from_authors(tmp_path / "c.pth.tar", num_bert_heads=heads)


@pytest.mark.parametrize(
    "listing",
    [path for folder in folders_of("full_size") for path in sorted(folder.glob("keys_dsran*.json"))],
    ids=lambda path: path.stem,
)
def test_every_name_and_shape_of_a_checkpoint_of_full_size(listing):
    """The trunk stands in the listing: it is the checkpoint's own that is loaded. Nothing is computed: the tensors have shapes only."""
    with torch.device("meta"):
        state = {
            name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            for name, entry in read_json(listing)["state_dict"].items()
        }
        model = dsran_from_authors({}, state, source=str(listing))
    bare = {name.removeprefix("module."): value for name, value in state.items()}
    names = DsranNames(variant=variant_of(bare), joint_graphs=joint_graphs_of(bare))
    own = model.state_dict()
    assert {names.authors_from_ours(name): value.shape for name, value in own.items()} == {
        name: value.shape for name, value in bare.items() if name not in unused_names(state)
    }
    assert any(name.startswith("img_enc.cnn.layer4") for name in bare)
    assert model.image_encoder.trunk is not None
