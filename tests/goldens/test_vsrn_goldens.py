"""VSRN and its captioning branch: every array and number of a case against ours, one test each; and their checkpoint files."""

import re

import numpy as np
import onnx
import pytest
import torch

from dualmatch.export.graph import export_encoder
from dualmatch.export.half import to_half
from dualmatch.models import VSRN, from_authors
from dualmatch.models.authors import read_checkpoint, vsrn_from_authors
from dualmatch.models.authors_files import read_torch_file
from dualmatch.models.authors_vsrn import authors_from_ours, authors_states
from dualmatch.models.vsrn import similarity
from dualmatch.models.vsrn_caption import caption_targets
from dualmatch.runtime.backends import open_session
from dualmatch.runtime.errors import DualmatchError
from dualmatch.training.loss import hinge_loss

from ..agreement import largest_difference  # noqa: TID252  (the tests are no package)
from .cases import folders_of, golden_folder, read_json
from .vsrn_case import VsrnCase

CASES = [VsrnCase(folder) for folder in folders_of("vsrn")]
FILES = {"io.npz", "opt.json", "state_0.safetensors", "state_1.safetensors", "caption_model.safetensors"}
FACTS = {"kind", "seed", "opt", "B", "regions", "state_container", "note"}
NUMBERS = {"duplicate_params_in_optimizer", "train_grad_norms_before_clip"}
TESTED = re.compile(
    r"in/(regions|captions|lengths|caption_labels|caption_masks)|mid/.+|out/.+|caption/.+"
    r"|loss/(cosine|order)_(hardest|sum_all)(_dimg|_dcap)?|train/grad/.+|train/(retrieval|caption)_loss"
)
# A constant added to all regions just before a BatchNorm over them changes nothing: the gradient of this bias is rounding noise.
NO_EFFECT = re.compile(r"Rs_GCN_\d+\.W\.0\.bias")
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def parametrize(pattern):
    found = [(case, name) for case in CASES for name in case.theirs if re.fullmatch(pattern, name)]
    return pytest.mark.parametrize(("case", "name"), found, ids=str)


def assert_close(ours, theirs, *, relative=0.0, absolute=0.0):
    ours = ours.detach().numpy()
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max()
    allowed = relative * np.abs(theirs).max() + absolute
    assert error <= allowed, f"differs by {error:.3g}, allowed {allowed:.3g}"


@each_case
def test_nothing_in_the_case_is_passed_over(case):
    assert not [name for name in case.theirs if not TESTED.fullmatch(name)]
    assert {path.name for path in case.folder.iterdir()} == FILES
    assert NUMBERS <= case.facts.keys() <= FACTS | NUMBERS


@each_case
def test_every_tensor_is_loaded(case):
    written = authors_states(case.network())
    for ours, theirs in zip(written, case.states, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    assert len(list(case.captioner().parameters())) == len(case.captioner_state)


@each_case
def test_names_go_both_ways(case):
    model = case.network()
    for name in model.state_dict():
        assert case.ours(authors_from_ours(name, model.config.num_relation_layers)) == name


@each_case
def test_options_are_the_files_own(case):
    config = case.network().config
    assert config.normalise_projected == (not config.final_norm) == (case.opt["data_name"] != "f30k_precomp")
    assert config.captioning.bidirectional == case.opt["bidirectional"]
    assert config.measure == case.opt["measure"]


@parametrize("mid/.+")
def test_intermediate_values(case, name):
    assert name in case.evaluated, f"nothing of ours stands for {name}"
    assert_close(case.evaluated[name], case.theirs[name], relative=1e-4)


@parametrize("out/.+")
def test_embeddings(case, name):
    assert_close(case.evaluated[name], case.theirs[name], absolute=2e-5)


@each_case
def test_the_cases_captions_and_images_do_not_depend_on_their_batch(case):
    for side in ("img_emb_batch_of_one", "cap_emb_batch_of_one_unpadded"):
        assert_close(case.evaluated[f"out/{side}"], case.theirs[f"out/{side[:7]}"], absolute=2e-5)


@each_case
def test_caption_labels_and_masks(case):
    labels, mask = caption_targets(case.input("captions"), max_length=case.opt["max_len"])
    np.testing.assert_array_equal(labels.numpy(), case.theirs["in/caption_labels"])
    np.testing.assert_array_equal(mask.numpy(), case.theirs["in/caption_masks"])


@parametrize("caption/.+")
def test_captioning(case, name):
    assert name in case.evaluated, f"nothing of ours stands for {name}"
    ours, theirs = case.evaluated[name], case.theirs[name]
    if theirs.dtype.kind == "i":
        np.testing.assert_array_equal(ours.numpy(), theirs)
    else:
        assert_close(ours, theirs, absolute=1e-4)


@parametrize("loss/.+")
def test_loss_and_its_gradients(case, name):
    measure, negatives, side = re.fullmatch(r"loss/(cosine|order)_(hardest|sum_all)_?(dimg|dcap|)", name).groups()
    images = torch.from_numpy(case.theirs["out/img_emb"]).requires_grad_()
    captions = torch.from_numpy(case.theirs["out/cap_emb"]).requires_grad_()
    loss = hinge_loss(similarity(images, captions, measure), margin=case.opt["margin"], hardest=negatives == "hardest")
    gradients = dict(zip(("dimg", "dcap"), torch.autograd.grad(loss, (images, captions)), strict=True))
    assert_close({"": loss, **gradients}[side], case.theirs[name], absolute=1e-4)


@parametrize("train/(retrieval|caption)_loss")
def test_losses_of_the_first_step(case, name):
    assert_close(case.trained.losses[name.removeprefix("train/")], case.theirs[name], absolute=1e-4)


@parametrize("train/grad/.+")
def test_gradients_of_the_first_step(case, name):
    tensor = name.removeprefix("train/grad/")
    largest = max(gradient.norm().item() for gradient in case.trained.gradients.values())
    noise = 1e-4 * largest if NO_EFFECT.search(tensor) else 0.0
    ours, theirs = case.trained.gradients[case.ours(tensor)], case.theirs[name]
    assert_close(ours.reshape(theirs.shape), theirs, relative=1e-3, absolute=noise)


@each_case
def test_gradient_norms_of_all_tensors(case):
    norms = case.facts["train_grad_norms_before_clip"]
    ours = {name: gradient.norm().item() for name, gradient in case.trained.gradients.items()}
    real = {case.ours(name): norm for name, norm in norms.items() if not NO_EFFECT.search(name)}
    assert {name: ours[name] for name in real} == pytest.approx(real, rel=1e-3)
    assert all(ours[name] < 1e-4 * max(real.values()) for name in ours.keys() - real.keys())
    assert ours.keys() == {case.ours(name) for name in norms}
    assert case.facts["duplicate_params_in_optimizer"] == len(list(case.captioner().parameters()))


# Graphs.


def feeds(case, side, batch, length):
    chance = np.random.default_rng(batch + length)
    if side == "image":
        shape = (batch, *case.theirs["in/regions"].shape[1:])
        return {"regions": np.abs(chance.standard_normal(shape)).astype(np.float32)}
    token_ids = chance.integers(1, case.opt["vocab_size"], (batch, length))
    lengths = chance.integers(1, length + 1, batch)
    return {"token_ids": token_ids * (np.arange(length) < lengths[:, None])}


@pytest.mark.parametrize("side", ["image", "text"])
@each_case
def test_onnx_in_float32_and_float16(case, side, tmp_path):
    model = case.network()
    encoder = model.image_encoder if side == "image" else model.text_encoder
    example = {name: torch.from_numpy(value) for name, value in feeds(case, side, 3, 7).items()}
    graph = export_encoder(encoder, example, tmp_path / "single.onnx", output=f"{side}_embedding")
    lengths = (1,) if side == "image" else (1, 2, 5, 17, 40)
    batches = [feeds(case, side, batch, length) for batch in (1, 2, 7) for length in lengths]
    own = {"regions": case.theirs["in/regions"]} if side == "image" else {"token_ids": case.theirs["in/captions"]}
    assert largest_difference(encoder, tmp_path / "single.onnx", [*batches, own]) < 1e-5
    onnx.save(to_half(graph), tmp_path / "half.onnx")
    with open_session(tmp_path / "half.onnx") as session:
        (half,) = session.run(own).values()
    single = case.theirs["out/img_emb" if side == "image" else "out/cap_emb"]
    cosines = (half * single).sum(axis=1) / np.linalg.norm(half, axis=1) / np.linalg.norm(single, axis=1)
    assert cosines.min() > 0.9999


# Checkpoint files.

CHECKPOINTS = [
    path for folder in folders_of("checkpoints") for path in sorted(folder.iterdir()) if path.name.startswith("vsrn")
]
each_checkpoint = pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.name)


def case_of(path):
    return VsrnCase(golden_folder() / path.name.removesuffix(".pth.tar"))


@each_checkpoint
def test_embeddings_of_the_loaded_network(path):
    case, model = case_of(path), from_authors(path)
    assert isinstance(model, VSRN)
    assert not model.training
    with torch.no_grad():
        assert_close(model.text_encoder(case.input("captions")), case.theirs["out/cap_emb"], absolute=2e-5)
        # Its BatchNorm statistics had seen more batches when the checkpoint was saved than when the case was.
        images = model.image_encoder(case.input("regions"))
        assert torch.isfinite(images).all()
        moved = {name: value for name, value in case.network().state_dict().items() if ".running_" in name}
        model.load_state_dict(moved, strict=False)
        assert_close(model.image_encoder(case.input("regions")), case.theirs["out/img_emb"], absolute=2e-5)


@each_checkpoint
@pytest.mark.parametrize("side", [0, 1], ids=["images", "captions"])
def test_unknown_tensors_are_ignored_among_the_images_only(path, side, tmp_path):
    """As in the authors' code: their image encoder loads what it knows, their text encoder insists."""
    values = read_torch_file(path)
    values["model"][side] |= {"rnn.weight_ih_l1": torch.zeros(3), "head.weight": torch.zeros(3)}
    torch.save(values, tmp_path / "c.pth.tar")
    if side == 0:
        own = from_authors(path).state_dict()
        for name, value in from_authors(tmp_path / "c.pth.tar").state_dict().items():
            torch.testing.assert_close(value, own[name], rtol=0, atol=0)
    else:
        with pytest.raises(DualmatchError, match=r"c\.pth\.tar: .*txt_enc\.(rnn|head)\.weight"):
            from_authors(tmp_path / "c.pth.tar")


@each_checkpoint
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data_name", "f30k_precomp", "lacks 4 tensors, the first 'img_enc.bn.weight'"),
        ("data_name", "f30k", "'f30k'; only the authors' networks on precomputed regions"),
        ("vocab_size", 7, "options say vocab_size = 7, its tensors"),
        ("embed_size", 7, "options say embed_size = 7"),
        ("measure", "dot", "measure must be one of 'cosine', 'order', got 'dot'"),
        ("dim_hidden", "wide", "options.hidden_dim must be of type int"),
    ],
)
def test_options_that_contradict_the_tensors_or_make_no_sense(path, name, value, message, tmp_path):
    values = read_torch_file(path)
    setattr(values["opt"], name, value)
    torch.save(values, tmp_path / "c.pth.tar")
    with pytest.raises(DualmatchError, match=rf"c\.pth\.tar: .*{message}"):
        from_authors(tmp_path / "c.pth.tar")


@each_checkpoint
@pytest.mark.parametrize("change", ["missing", "reshaped"])
@pytest.mark.parametrize(("side", "name"), [(0, "Rs_GCN_2.W.0.weight"), (0, "fc.weight"), (1, "embed.weight")])
def test_tensors_that_do_not_fit(path, change, side, name, tmp_path):
    values = read_torch_file(path)
    if change == "missing":
        del values["model"][side][name]
    else:
        values["model"][side][name] = torch.zeros(3)
    torch.save(values, tmp_path / "c.pth.tar")
    with pytest.raises(DualmatchError, match=rf"c\.pth\.tar: .*{re.escape(name)}'"):
        from_authors(tmp_path / "c.pth.tar")


@each_checkpoint
def test_counters_may_be_missing_and_the_options_become_ours(path, tmp_path):
    values = read_torch_file(path)
    vars(values["opt"]).update(measure="order", use_abs=True, no_imgnorm=True)
    values["model"][0] = {k: v for k, v in values["model"][0].items() if not k.endswith("batches_tracked")}
    torch.save(values, tmp_path / "c.pth.tar")
    model = from_authors(tmp_path / "c.pth.tar")
    assert (model.config.measure, model.config.absolute, model.config.normalise_images) == ("order", True, False)
    with torch.no_grad():
        images = model.image_encoder(case_of(path).input("regions"))
    assert (images >= 0).all()
    assert (images.norm(dim=1) - 1).abs().max() > 1e-3
    assert read_checkpoint(tmp_path / "c.pth.tar").opt["measure"] == "order"


@pytest.mark.parametrize(
    "listing",
    [path for folder in folders_of("full_size") for path in sorted(folder.glob("keys_vsrn*.json"))],
    ids=lambda path: path.stem,
)
def test_every_name_and_shape_of_a_checkpoint_of_full_size(listing):
    """Nothing is computed: the tensors have shapes only."""
    described = read_json(listing)
    with torch.device("meta"):
        states = tuple(
            {
                name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
                for name, entry in described[f"model[{index}]"].items()
            }
            for index in range(2)
        )
        opt = {"data_name": listing.stem.removeprefix("keys_vsrn_") + "_precomp"}
        model = vsrn_from_authors(opt, states, source=str(listing))
    for ours, theirs in zip(authors_states(model), states, strict=True):
        assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in theirs.items()}
