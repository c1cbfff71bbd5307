"""From a checkpoint in the authors' own format to a bundle that serves their numbers, with a ResNet-152 of few channels in between."""

import pickle
import re
import sys
from argparse import Namespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("nltk")

import nltk
import onnx
import torch
from nltk.tokenize import word_tokenize
from PIL import Image

from dualmatch.export import bundle as export
from dualmatch.export.bundle import export_run
from dualmatch.models import DSRAN, VSRN, DsranConfig, RegionConfig, TextConfig, TrunkConfig, VsrnConfig, from_authors
from dualmatch.models import authors as authors_module
from dualmatch.models.authors_dsran import DsranNames
from dualmatch.models.authors_vsrn import authors_states
from dualmatch.models.trunks import ResNet152
from dualmatch.runtime import ImageEncoder, TextEncoder, load_bundle
from dualmatch.runtime.datasets import make_scenes, open_dataset
from dualmatch.runtime.files import sha256_of_file
from dualmatch.runtime.parity import Tolerances
from dualmatch.runtime.reference import read_reference
from dualmatch.runtime.regions import RegionFile
from dualmatch.training.authors_run import run_from_authors
from dualmatch.training.padding import with_padding

from .demo_fixture import dualmatch, one_sentence, write_captions_folder
from .tiny_models import randomised, settled
from .tiny_runs import write_regions

BATCH = 7  # of captions, in the checkpoints' options: it divides nothing here
KINDS = ("gru", "bert", "vsrn")
each_kind = pytest.mark.parametrize("kind", KINDS)
WIDE = Tolerances(rsum_loss=600.0, worst_cosine=-1.0)


class Vocabulary:
    """In the authors' shape; pickled under the name that theirs has."""

    def __init__(self, words):
        self.word2idx = {word: index for index, word in enumerate(words)}
        self.idx2word = dict(enumerate(words))
        self.idx = len(words)


Vocabulary.__module__ = "__main__"
Vocabulary.__qualname__ = "Vocabulary"


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class SmallTrunk(ResNet152):
    """A ResNet with the names, strides and last width of ResNet-152, but a hundredth of its weights."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        from transformers import ResNetConfig, ResNetModel

        sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 2048], "depths": [1, 2, 1, 1]}
        self.resnet = ResNetModel(ResNetConfig(**sizes, layer_type="bottleneck"))


@pytest.fixture(autouse=True, scope="module")
def _small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authors_module, "ResNet152", SmallTrunk)
        patch.setattr(sys.modules["__main__"], "Vocabulary", Vocabulary, raising=False)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """data/, regions.npz, a checkpoint and a vocabulary of each kind."""
    folder = tmp_path_factory.mktemp("authors")
    write_captions_folder(folder / "data", make_scenes(num_train=6, num_val=2, num_test=4).items)
    dataset = open_dataset(folder / "data")
    positions = np.random.default_rng(1).normal(size=(len(dataset.items), 3, 9)).astype(np.float32)
    write_regions(folder / "regions.npz", dataset, positions=positions)
    words = sorted({word for caption in dataset.captions for word in word_tokenize(caption, preserve_line=True)})
    common = [word for index, word in enumerate(words) if index % 9]  # the others are <unk>
    write_vocabulary(folder / "words.pkl", common)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz.", *(f"##{c}" for c in "aeinorst")]
    pieces += [word for word in common if len(word) > 1]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    for kind in KINDS:
        size = len(pieces) if kind == "bert" else len(common) + 4
        write_checkpoint(folder / f"{kind}.pth.tar", network(kind, size))
    return folder


def write_vocabulary(path, words):
    path.write_bytes(pickle.dumps(Vocabulary(["<pad>", "<start>", "<end>", "<unk>", *words])))


def network(kind, vocabulary_size, trunk=SmallTrunk):
    torch.manual_seed(0)
    if kind == "vsrn":
        text = TextConfig(encoder="gru", vocabulary_size=vocabulary_size, word_dim=12)
        model = VSRN(VsrnConfig(feature_dim=10, embed_dim=16, num_relation_layers=2, text=text))
    else:
        text = TextConfig(encoder="gru", vocabulary_size=vocabulary_size, word_dim=12, max_length=0)
        if kind == "bert":
            sizes = {"word_dim": 64, "num_layers": 2, "num_heads": 1, "intermediate_dim": 32, "max_positions": 40}
            fixed = {"max_length": 32, "fixed_length": 32, "keep_last_special": False, "normalise_tokens": False}
            text = TextConfig(encoder="bert", vocabulary_size=vocabulary_size, **sizes, **fixed)
        regions = RegionConfig(
            source="precomputed",
            feature_dim=10,
            position_dim=9 if kind == "bert" else 0,
            hidden_layer=kind == "bert",
        )
        model = DSRAN(
            DsranConfig(
                trunk=TrunkConfig(name="resnet152"),
                regions=regions,
                text=text,
                embed_dim=16,
                joint_graphs=2,
                projection="relu" if kind == "bert" else "linear",
                l2_epsilon=0.0 if kind == "bert" else 1e-12,
                pad_policy="authors",
            ),
            trunk(),
        )
    chance = torch.Generator().manual_seed(1)
    shapes = {"pixels": (3, 224, 224), "regions": (3, 10), "region_positions": (3, 9)}
    images = {name: torch.randn(8, *shapes[name], generator=chance) for name in model.image_encoder.input_names}
    for encoder, inputs in (
        (model.image_encoder, images),
        (model.text_encoder, {"token_ids": torch.randint(1, vocabulary_size, (8, 12), generator=chance)}),
    ):
        randomised(encoder)
        settled(encoder, inputs)
    return model.eval()


def authors_model(model):
    """What the authors save as `model`: one plain dict, one with `module.` in front, or two."""
    if isinstance(model, VSRN):
        return authors_states(model)
    variant = model.config.text.encoder
    names = DsranNames(variant=variant, joint_graphs=2)
    state = {names.authors_from_ours(name): value for name, value in model.state_dict().items()}
    state["img_enc.cnn.fc.weight"] = torch.zeros(3, 2048)
    return {f"module.{name}": value for name, value in state.items()} if variant == "bert" else [state]


def write_checkpoint(path, model, *, without=(), **opt):
    """In the format of PyTorch 1.1."""
    saved = authors_model(model)
    for state in saved if isinstance(saved, list) else [saved]:
        for name in [name for name in state if name.removeprefix("module.").startswith(tuple(without))]:
            del state[name]
    default = {"batch_size": BATCH, "data_name": "coco_precomp" if isinstance(model, VSRN) else "f30k"}
    values = {"epoch": 3, "model": saved, "best_rsum": 321.5, "opt": Namespace(**default | opt), "Eiters": 9}
    torch.save(values, path, _use_new_zipfile_serialization=False)


def vocabulary_of(place, kind):
    return place / ("vocab.txt" if kind == "bert" else "words.pkl")


def arguments(place, kind, *more):
    words = () if kind == "bert" else ("--one-sentence",)
    given = ("--vocab", vocabulary_of(place, kind), "--data", place / "data", "--regions", place / "regions.npz")
    return ("export", place / f"{kind}.pth.tar", *given, *words, *more)


@pytest.fixture(scope="module")
def bundles(place, tmp_path_factory):
    """A bundle of each kind, by the command."""
    folder = tmp_path_factory.mktemp("bundles")
    for kind in KINDS:
        finished = dualmatch(*arguments(place, kind, "--out", folder / kind))
        assert finished.code == 0, finished.err
    return folder


def rows_of(place, kind, captions):
    """Ids as the authors' own code cuts captions, NLTK's included."""
    if kind == "bert":
        from transformers import BertTokenizer

        tokenizer = BertTokenizer(str(place / "vocab.txt"), do_lower_case=True)
        return [tokenizer.encode(caption)[:32] for caption in captions]
    with (place / "words.pkl").open("rb") as file:
        ids = pickle.load(file).word2idx
    words = [word_tokenize(caption.lower(), preserve_line=True) for caption in captions]
    return [[1, *(ids.get(word, 3) for word in one), 2] for one in words]


def in_batches(model, rows, length=0):
    """Captions through torch as the authors' evaluation batches them."""
    parts = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        longest = length or max(map(len, batch))
        padded = [row + [0] * (longest - len(row)) for row in batch]
        with torch.no_grad():
            parts.append(model.text_encoder(torch.tensor(padded)).numpy())
    return np.concatenate(parts)


@each_kind
def test_a_bundle_serves_captions_as_the_authors_code_embeds_them(kind, place, bundles):
    captions = open_dataset(place / "data").captions
    wanted = in_batches(from_authors(place / f"{kind}.pth.tar"), rows_of(place, kind, captions), 32 * (kind == "bert"))
    np.testing.assert_allclose(read_reference(bundles / kind).captions, wanted, rtol=0, atol=1e-6)
    bundle = load_bundle(bundles / kind)
    with TextEncoder(bundle, batch_size=bundle.manifest.caption_batch) as encoder:
        np.testing.assert_allclose(encoder.encode(captions), wanted, rtol=0, atol=1e-5)
    with TextEncoder(bundle, batch_size=2 * BATCH) as encoder:
        moved = np.abs(encoder.encode(captions) - wanted).max()
    assert moved > 1e-3 if kind == "gru" else moved < 1e-5  # only their GRU variant sees its batch


@each_kind
def test_a_bundle_serves_photographs_as_the_authors_code_embeds_them(kind, place, bundles):
    regions = RegionFile(place / "regions.npz")
    items = open_dataset(place / "data").items
    inputs = {"regions": np.stack([regions.features(item.id) for item in items])}
    if kind == "bert":
        inputs["region_positions"] = np.stack([regions.positions(item.id) for item in items])
    if kind != "vsrn":
        inputs["pixels"] = np.stack([centre(item.open().convert("RGB")) for item in items])
    with torch.no_grad():
        model = from_authors(place / f"{kind}.pth.tar")
        wanted = model.image_encoder(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()
    with ImageEncoder(bundles / kind, regions=regions) as encoder:
        served = encoder.encode_items(items)
    np.testing.assert_allclose(served, wanted, rtol=0, atol=1e-5)
    assert (served @ served.T)[~np.eye(len(items), dtype=bool)].min() < 0.99


def centre(image):
    """Shorter side to 256, the central 224 x 224, ImageNet's mean and deviation."""
    scale = 256 / min(image.size)
    image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - 224) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    normalised = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return normalised.transpose(2, 0, 1).astype(np.float32)


@each_kind
def test_the_manifest_says_what_was_read(kind, place, bundles):
    manifest = load_bundle(bundles / kind).manifest
    assert manifest.model["name"] == ("vsrn" if kind == "vsrn" else "dsran")
    assert manifest.pad_policy == ("masked" if kind == "vsrn" else "authors")
    assert (manifest.preprocessing is None) == (kind == "vsrn")
    assert manifest.caption_batch == BATCH
    assert manifest.provenance["checkpoint_sha256"] == sha256_of_file(place / f"{kind}.pth.tar")
    assert manifest.provenance["vocabulary_sha256"] == sha256_of_file(vocabulary_of(place, kind))
    assert manifest.provenance.get("sentences") == (None if kind == "bert" else "one a caption")
    assert manifest.provenance["epoch"] == 3
    assert manifest.parity["verdict"] == "pass"
    card = (bundles / kind / "README.md").read_text()
    assert "trained by its authors' code" in card
    assert "**may include pairs that the network was trained on**" in card


@each_kind
def test_verify_agrees(kind, place, bundles):
    given = ("--data", place / "data", "--regions", place / "regions.npz")
    finished = dualmatch("runtime", "verify", bundles / kind, *given)
    assert finished.code == 0, finished.err


# Other padding than the authors'.


@pytest.fixture
def opened(place, tmp_path):
    def open_kind(kind):
        words = kind != "bert"
        return run_from_authors(place / f"{kind}.pth.tar", vocabulary_of(place, kind), tmp_path, one_sentence=words)

    return open_kind


@pytest.fixture
def images_as_before(bundles, monkeypatch):
    """The image graph does not depend on padding: the first bundle's is taken, for tracing takes long."""
    traced = export.export_encoder

    def export_encoder(encoder, examples, path, *, output):
        if path.name != "image_encoder.onnx":
            return traced(encoder, examples, path, output=output)
        model = onnx.load(bundles / "gru" / path.name)
        onnx.save(model, path)
        return model

    monkeypatch.setattr(export, "export_encoder", export_encoder)


@pytest.mark.usefixtures("images_as_before")
@pytest.mark.parametrize("change", [{"pad_policy": "masked"}, {"fixed_length": 20}], ids=str)
def test_other_padding_is_stated_and_its_cost_measured(change, place, opened, tmp_path):
    dataset, regions = open_dataset(place / "data"), RegionFile(place / "regions.npz")
    run = with_padding(opened("gru"), **change)
    result = export_run(run, dataset, tmp_path / "out", regions=regions, tolerances=WIDE, unverified=True)
    manifest = result.bundle.manifest
    assert manifest.pad_policy == change.get("pad_policy", "authors")
    assert manifest.tokenizer.fixed_length == change.get("fixed_length", 0)
    trained = {"pad_policy": "authors", "fixed_length": 0, "caption_batch": BATCH}
    assert manifest.provenance["reference_padding"] == trained
    assert "what the change costs" in (tmp_path / "out" / "README.md").read_text()
    # The reference is the authors' embedding, batch by batch; what is served differs from it, and not with its batch.
    rows = rows_of(place, "gru", dataset.captions)
    reference = read_reference(tmp_path / "out")
    model = from_authors(place / "gru.pth.tar")
    np.testing.assert_allclose(reference.captions, in_batches(model, rows), rtol=0, atol=1e-6)
    comparison = result.verification.comparison
    assert comparison.caption_cosine[0] < 0.999 < comparison.image_cosine[0]
    served = []
    for size in (1, BATCH, 64):
        with TextEncoder(result.bundle, batch_size=size) as encoder:
            served.append(encoder.encode(dataset.captions))
    np.testing.assert_allclose(served[1], served[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(served[2], served[0], rtol=0, atol=1e-5)
    if "fixed_length" in change:
        cut = [row if len(row) <= 20 else [*row[:19], row[-1]] for row in rows]
        assert cut != rows
        np.testing.assert_allclose(served[0], in_batches(model, cut, 20), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("images_as_before")
def test_the_cost_is_judged_by_recall_and_a_dozen_photographs_do_not_show_it(place, tmp_path):
    finished = dualmatch(*arguments(place, "gru", "--pad-policy", "masked", "--out", tmp_path / "out"))
    assert finished.code == 1
    assert "the fp32 gate refused the export" in finished.err
    assert "Rsum" in finished.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_padding_that_it_has_is_no_change(opened):
    run = opened("gru")
    assert with_padding(run) is run
    assert with_padding(run, pad_policy="authors") is run
    bert = opened("bert")
    assert with_padding(bert, fixed_length=32) is bert


# What is refused.


def damaged(folder, place, change):
    """A checkpoint and a vocabulary with something wrong, and further options."""
    checkpoint, vocabulary, more = place / "gru.pth.tar", place / "words.pkl", ("--one-sentence",)
    size = from_authors(checkpoint).config.text.vocabulary_size
    if change == "vocabulary of another size":
        vocabulary = folder / "other.pkl"
        write_vocabulary(vocabulary, ["a", "dog"])
    elif change == "pieces for words":
        vocabulary = place / "vocab.txt"
    elif change == "words for pieces":
        checkpoint, more = place / "bert.pth.tar", ()
    elif change == "hostile vocabulary":
        vocabulary = folder / "hostile.pkl"
        vocabulary.write_bytes(pickle.dumps(Attack(folder / "executed")))
    elif change == "hostile checkpoint":
        checkpoint = folder / "hostile.pth.tar"
        torch.save({"model": Attack(folder / "executed")}, checkpoint, _use_new_zipfile_serialization=False)
    elif change == "truncated checkpoint":
        checkpoint = folder / "short.pth.tar"
        checkpoint.write_bytes((place / "gru.pth.tar").read_bytes()[:-1000])
    elif change == "no trunk":
        checkpoint = folder / "bare.pth.tar"
        write_checkpoint(checkpoint, network("gru", size), without=["img_enc.cnn."])
    elif change == "no batch size":
        checkpoint = folder / "size.pth.tar"
        write_checkpoint(checkpoint, network("gru", size), batch_size=None)
    elif change == "order measure":
        checkpoint = folder / "order.pth.tar"
        write_checkpoint(checkpoint, network("vsrn", size), measure="order")
    elif change == "sentences of pieces":
        checkpoint, vocabulary = place / "bert.pth.tar", place / "vocab.txt"
    elif change == "padding of VSRN":
        checkpoint, more = place / "vsrn.pth.tar", (*more, "--pad-policy", "masked")
    elif change == "captions too long for BERT":
        checkpoint, vocabulary, more = place / "bert.pth.tar", place / "vocab.txt", ("--fixed-length", "64")
    elif change == "no Punkt":
        more = ()
    else:
        assert change == "vocabulary for a run"
        checkpoint = folder / "run"
        checkpoint.mkdir()
    return checkpoint, ("--vocab", vocabulary, *more)


REFUSALS = {
    "vocabulary of another size": "holds 6 entries, .*was trained with",
    "pieces for words": "vocab.txt",
    "words for pieces": "is no vocab.txt of BERT",
    "hostile vocabulary": "hostile.pkl",
    "hostile checkpoint": "hostile.pth.tar",
    "truncated checkpoint": "short.pth.tar",
    "no trunk": "holds no ResNet-152",
    "no batch size": "batch_size = None",
    "order measure": "order measure",
    "sentences of pieces": "leave out --one-sentence",
    "padding of VSRN": "do not depend on padding",
    "captions too long for BERT": "64",
    "no Punkt": "punkt_tab is not on this machine",
    "vocabulary for a run": "a run has its own tokenizer",
}


@pytest.mark.parametrize("change", REFUSALS)
def test_what_does_not_fit_is_refused_in_a_sentence(change, place, tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    (tmp_path / "given").mkdir()
    checkpoint, more = damaged(tmp_path / "given", place, change)
    out = tmp_path / "out" / "bundle"
    given = ("--data", place / "data", "--regions", place / "regions.npz")
    finished = dualmatch("export", checkpoint, *given, *more, "--out", out)
    assert finished.code == 1
    assert one_sentence(finished.err), finished.err
    assert re.search(REFUSALS[change], finished.err), finished.err
    assert not out.parent.exists() or not list(out.parent.iterdir())
    assert not (tmp_path / "given" / "executed").exists()


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("--vocab", "needs its vocabulary, --vocab"), ("--data", "--data DATA"), ("--regions", "--regions FILE")],
)
def test_what_is_missing_is_asked_for(left_out, message, place, tmp_path):
    given = list(arguments(place, "gru", "--out", tmp_path / "bundle"))
    where = given.index(left_out)
    finished = dualmatch(*given[:where], *given[where + 2 :])
    assert finished.code == 1
    assert one_sentence(finished.err)
    assert message in finished.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("channels", "message"), [(11, "takes regions of 10 channels"), (10, "positions of 9 numbers")]
)
def test_regions_of_another_width_are_refused(channels, message, place, tmp_path):
    dataset = open_dataset(place / "data")
    positions = np.zeros((len(dataset.items), 3, 4), np.float32)
    regions = write_regions(tmp_path / "other.npz", dataset, channels=channels, positions=positions)
    given = [regions if one == place / "regions.npz" else one for one in arguments(place, "bert")]
    finished = dualmatch(*given, "--out", tmp_path / "bundle")
    assert finished.code == 1
    assert one_sentence(finished.err)
    assert message in finished.err
    assert [path.name for path in tmp_path.iterdir()] == ["other.npz"]


@pytest.mark.slow
def test_the_whole_way_with_a_real_trunk(place, tmp_path, monkeypatch):
    monkeypatch.setattr(authors_module, "ResNet152", ResNet152)
    size = from_authors(place / "vsrn.pth.tar").config.text.vocabulary_size
    write_checkpoint(tmp_path / "real.pth.tar", network("gru", size, ResNet152))
    given = arguments(place, "gru", "--out", tmp_path / "bundle")
    finished = dualmatch("export", tmp_path / "real.pth.tar", *given[2:])
    assert finished.code == 0, finished.err
    assert load_bundle(tmp_path / "bundle").file("image_encoder.onnx").stat().st_size > 200_000_000
