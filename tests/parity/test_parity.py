"""Does a bundle give on this backend what torch gave? Point it at any: `make parity BUNDLE=DIR [BACKEND=…] [DATA=DIR] [REGIONS=FILE]`."""

import numpy as np
import pytest

from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.verify import tolerances_of, verify

# Rounding that batching alone may cause, per component of a unit vector.
SAME = {"fp32": 5e-6, "fp16": 5e-3, "int8": 2e-2}  # a rounding that falls the other way is a whole step of int8
NORM = {"fp32": 1e-5, "fp16": 1e-3, "int8": 1e-3}
BATCHES = (1, 2, 7)
LENGTHS = (1, 2, 5, 17, 40)


def precision(subject, encoder):
    return subject.bundle.manifest.encoders[encoder].precision


def largest(first, second):
    assert first.shape == second.shape
    assert np.isfinite(first).all()
    return float(np.abs(first - second).max())


def lengths(subject):
    """Lengths that the text graph is served with."""
    options = subject.bundle.manifest.tokenizer
    if options.fixed_length:
        return [options.fixed_length]
    return [length for length in LENGTHS if not options.max_length or length <= options.max_length]


def token_ids(subject, batch, length, seed=0):
    """Rows of the gate's own captions, each repeated and cut to some length up to `length`; the first fills it."""
    chance = np.random.default_rng(seed)
    with subject.texts() as encoder:
        captions = encoder.tokenizer.ids(
            [subject.reference.texts[i % len(subject.reference.texts)] for i in range(batch)]
        )
    rows = np.zeros((batch, length), dtype=np.int64)
    for number, ids in enumerate(captions):
        own = length if number == 0 else int(chance.integers(1, length + 1))
        rows[number, :own] = np.resize(ids, own)
    return rows


def sample_inputs(subject, encoder):
    """The stored samples without torch's outputs for them."""
    names = [spec.name for spec in subject.bundle.manifest.encoders[encoder].inputs]
    return {name: subject.reference.samples[encoder][name] for name in names}


def image_inputs(subject, batch):
    """The stored samples, repeated or cut to a batch."""
    inputs = sample_inputs(subject, "image")
    return {name: np.resize(value, (batch, *value.shape[1:])) for name, value in inputs.items()}


def test_every_hash_matches(subject):
    assert load_bundle(subject.bundle.path).hash == subject.bundle.hash


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_the_graph_takes_and_gives_what_the_manifest_says(encoder, subject):
    entry = subject.bundle.manifest.encoders[encoder]
    with subject.images() if encoder == "image" else subject.texts() as opened:
        session = opened.session
        for promised, found in ((entry.inputs, session.inputs), (entry.outputs, session.outputs)):
            assert {(spec.name, spec.dtype, spec.shape) for spec in promised} == {
                (spec.name, spec.dtype, spec.shape) for spec in found
            }
        assert session.backend == subject.backend
    assert [spec.shape for spec in entry.outputs] == [("batch", subject.bundle.manifest.embedding_dimension)]
    assert all(spec.shape[0] == "batch" for spec in entry.inputs)


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_the_stored_samples_give_torchs_embeddings(encoder, subject):
    sample = subject.reference.samples[encoder]
    with subject.images() if encoder == "image" else subject.texts() as opened:
        got = opened.run(sample_inputs(subject, encoder))
    assert largest(got, sample["embedding"]) <= subject.bundle.manifest.encoders[encoder].tolerance


@pytest.mark.parametrize("batch", BATCHES)
def test_an_image_alone_is_the_image_in_a_batch(batch, subject):
    with subject.images() as encoder:
        inputs = image_inputs(subject, batch)
        together = encoder.run(inputs)
        alone = [encoder.run({name: value[i : i + 1] for name, value in inputs.items()}) for i in range(batch)]
        turned = encoder.run({name: np.ascontiguousarray(value[::-1]) for name, value in inputs.items()})
    assert together.shape == (batch, subject.bundle.manifest.embedding_dimension)
    assert largest(together, np.concatenate(alone)) <= SAME[precision(subject, "image")]
    assert largest(together, turned[::-1]) <= SAME[precision(subject, "image")]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch", BATCHES)
def test_a_caption_alone_is_the_caption_in_a_batch(batch, length, subject):
    """Alone at the batch's length; under the `masked` policy also without any padding, and with more of it."""
    if length not in lengths(subject):
        pytest.skip(f"this bundle serves captions of {lengths(subject)} tokens")
    masked = subject.bundle.manifest.pad_policy == "masked"
    grows = masked and not subject.bundle.manifest.tokenizer.fixed_length
    ids = token_ids(subject, batch, length, seed=batch + length)
    with subject.texts() as encoder:
        together = encoder.run({"token_ids": ids})
        alone = [encoder.run({"token_ids": row[None]}) for row in ids]
        turned = encoder.run({"token_ids": np.ascontiguousarray(ids[::-1])})
        padded = encoder.run({"token_ids": np.pad(ids, ((0, 0), (0, 9)))}) if grows else together
        bare = [encoder.run({"token_ids": row[None, : np.count_nonzero(row)]}) for row in ids] if grows else alone
    same = SAME[precision(subject, "text")]
    assert together.shape == (batch, subject.bundle.manifest.embedding_dimension)
    for other in (np.concatenate(alone), turned[::-1], padded, np.concatenate(bare)):
        assert largest(together, other) <= same


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_embeddings_are_unit_vectors_that_tell_items_apart(encoder, subject):
    if encoder == "image":
        with subject.images() as images:
            got = images.run(image_inputs(subject, len(subject.reference.samples["image"]["embedding"])))
    else:
        with subject.texts() as texts:
            got = texts.encode(list(dict.fromkeys(subject.reference.texts))[:64])
    assert np.abs(np.linalg.norm(got, axis=1) - 1).max() <= NORM[precision(subject, encoder)]
    cosines = got @ got.T
    assert cosines[~np.eye(len(got), dtype=bool)].min() < 0.999


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_the_same_input_gives_the_same_bytes(encoder, subject):
    with subject.images() if encoder == "image" else subject.texts() as opened:
        feeds = (
            image_inputs(subject, 3)
            if encoder == "image"
            else {"token_ids": token_ids(subject, 3, lengths(subject)[-1])}
        )
        first, second = opened.run(feeds), opened.run(feeds)
    np.testing.assert_array_equal(first, second)


def test_captions_give_torchs_embeddings(subject):
    """From the text on: tokenising, batching and padding included; within the tolerances that the bundle's gate was run with."""
    reference, tolerances = subject.reference, tolerances_of(subject.bundle)
    with subject.texts(batch_size=subject.bundle.manifest.caption_batch) as encoder:
        got = encoder.encode(reference.texts)
    cosines = np.einsum("nd,nd->n", got, reference.captions, dtype=np.float64)
    worst = int(cosines.argmin())
    assert cosines[worst] >= tolerances.worst_cosine, reference.texts[worst]
    if tolerances.component is not None:
        assert largest(got, reference.captions) <= tolerances.component


def test_retrieval_is_torchs(subject):
    """`verify`: the photographs from their files on, decided by the bundle's own tolerances."""
    if subject.dataset is None:
        pytest.skip("not run: say with DATA=DIR where the photographs are that the bundle was gated on")
    found = verify(subject.bundle, subject.dataset, backend=subject.backend, regions=subject.regions)
    assert found.decision.verdict == "pass", found.decision.reason
