"""DSRAN, GRU and BERT: every array and number of a case against ours, one test each."""

import re

import numpy as np
import pytest
import torch

from dualmatch.models.authors import unused_names
from dualmatch.training.loss import hinge_loss

from .cases import folders_of
from .dsran_case import DsranCase

CASES = [DsranCase(folder) for kind in ("dsran_gru", "dsran_bert") for folder in folders_of(kind)]
FILES = {"io.npz", "opt.json", "state.safetensors"}
# A constant added to all nodes just before a softmax over nodes or a BatchNorm changes nothing: the gradient of these biases is rounding
# noise, and Adam makes whole steps of it.
NO_EFFECT = re.compile(r"encoder\.0\.(mha\.key|mha\.value|fc_in|fc_out)\.bias|\.key\.bias")


def parametrize(prefix):
    found = [(case, name) for case in CASES for name in case.theirs if name.startswith(prefix)]
    return pytest.mark.parametrize(("case", "name"), found, ids=str)


def assert_close(ours, theirs, *, relative=0.0, absolute=0.0):
    ours = ours.detach().numpy()
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max()
    allowed = relative * np.abs(theirs).max() + absolute
    assert error <= allowed, f"differs by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_in_the_case_is_passed_over(case):
    tested = (
        "in/",
        "mid/",
        "out/",
        "loss/margin_",
        "train/grad0/",
        "train/after3/",
        "train/after3_buf/",
        "train/losses",
    )
    assert not [name for name in case.theirs if not name.startswith(tested)]
    assert FILES <= {path.name for path in case.folder.iterdir()} <= {*FILES, "glove_init.npz", "glove_init.json"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_loaded_or_unused(case):
    loaded = case.network().state_dict()
    for name, value in case.state.items():
        if name.removeprefix("module.") in unused_names(case.state):
            continue
        torch.testing.assert_close(loaded.pop(case.ours(name)), value, rtol=0, atol=0)
    assert not loaded


@pytest.mark.parametrize("case", CASES, ids=str)
def test_names_go_both_ways(case):
    for name in case.network().state_dict():
        assert case.ours(case.names.authors_from_ours(name)) == name


@parametrize("mid/")
def test_intermediate_values(case, name):
    assert name in case.evaluated, f"nothing of ours stands for {name}"
    assert_close(case.evaluated[name], case.theirs[name], relative=1e-4)


@parametrize("out/")
def test_embeddings(case, name):
    assert_close(case.evaluated[name], case.theirs[name], absolute=2e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_caption_depends_on_its_batch_as_much_as_theirs_does(case):
    ours = (case.evaluated["out/cap_emb"] - case.evaluated["out/cap_emb_batch_of_one_unpadded"]).abs().max().item()
    assert ours == pytest.approx(case.facts["eval_caption_diff_batch_vs_alone"], abs=2e-5)


@parametrize("loss/")
def test_loss_and_its_gradients(case, name):
    margin, _, side = name.removeprefix("loss/margin_").partition("_")
    images = torch.from_numpy(case.theirs["out/img_emb"]).requires_grad_()
    captions = torch.from_numpy(case.theirs["out/cap_emb"]).requires_grad_()
    loss = hinge_loss(images @ captions.T, margin=float(margin))
    gradients = dict(zip(("dimg", "dcap"), torch.autograd.grad(loss, (images, captions)), strict=True))
    assert_close({"": loss, **gradients}[side], case.theirs[name], absolute=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_of_the_first_steps(case):
    assert case.trained.losses == pytest.approx(case.theirs["train/losses"].tolist(), abs=1e-4)
    assert case.trained.losses[-1] < case.trained.losses[0]


@parametrize("train/grad0/")
def test_gradients_of_the_first_step(case, name):
    tensor = name.removeprefix("train/grad0/")
    largest = max(gradient.abs().max().item() for gradient in case.trained.gradients.values())
    noise = 1e-4 * largest if NO_EFFECT.search(tensor) else 0.0
    assert_close(case.trained.gradients[case.ours(tensor)], case.theirs[name], relative=1e-3, absolute=noise)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_norms_of_all_tensors(case):
    ((_, norms),) = ((key, value) for key, value in case.facts["train"].items() if key.startswith("grad_norms"))
    ours = {name: gradient.norm().item() for name, gradient in case.trained.gradients.items()}
    real = {case.ours(name): norm for name, norm in norms.items() if not NO_EFFECT.search(name)}
    assert {name: ours[name] for name in real} == pytest.approx(real, rel=1e-3)
    assert all(ours[name] < 1e-3 * max(real.values()) for name in ours.keys() - real.keys())
    assert ours.keys() == {case.ours(name) for name in norms}
    without = {name.removeprefix("module.") for name in case.facts["train"]["no_grad"]}
    assert without <= set(unused_names(case.state))


@parametrize("train/after3/")
def test_parameters_after_the_first_steps(case, name):
    tensor = name.removeprefix("train/after3/")
    before, after = case.state[tensor].numpy(), case.trained.after[case.ours(tensor)].numpy()
    theirs = case.theirs[name]
    moved = np.abs(theirs - before).max()
    if NO_EFFECT.search(tensor):
        farthest = len(case.trained.losses) * case.opt["learning_rate"] * 1.01
        assert max(moved, np.abs(after - before).max()) <= farthest
    else:
        # Adam divides by the gradient's size: where it is almost zero, rounding shows in the step. Float32 itself keeps 6e-8 of a value.
        near = np.abs(after - theirs) <= 0.005 * moved + 1.2e-7 * np.abs(theirs)
        assert moved > 0
        assert near.mean() >= 0.99, f"{near.mean():.1%} of the parameters moved where theirs did"


@parametrize("train/after3_buf/")
def test_batch_norm_after_the_first_steps(case, name):
    tensor = name.removeprefix("train/after3_buf/")
    # The mean carries the biases of NO_EFFECT with it.
    drift = 5 * case.opt["learning_rate"] if tensor.endswith("running_mean") else 0.0
    assert_close(case.trained.after[case.ours(tensor)], case.theirs[name], relative=1e-4, absolute=drift)
    assert not np.array_equal(case.theirs[name], case.state[tensor].numpy())
