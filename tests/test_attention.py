"""What the network looks at: nodes against torch, the papers' arithmetic against a naive one, and pictures in the photograph's pixels."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from dualmatch.runtime import Gallery, ImageEncoder, TextEncoder, load_bundle
from dualmatch.runtime.attention import (
    LAMBDA,
    AttentionMaps,
    Nodes,
    attention_maps,
    colour_table,
    has_attention,
    overlay,
    painted,
    rank_scores,
)
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.explain import explained
from dualmatch.runtime.preprocess import Preprocess, open_rgb
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.search import Query, search_all
from dualmatch.runtime.sheet import HTML_THUMBNAIL, Hit

from .demo_fixture import dualmatch, edit_manifest, one_sentence


@pytest.fixture
def photos(small_run):
    return sorted((small_run.data / "images").iterdir())[:5]


# --- the papers' arithmetic ---


def test_vsrn_ranks_regions_and_sums_their_scores_at_every_pixel():
    # Four regions on a strip of six pixels: products 0.1, 0.9, 0.5, 0.5, so ranks 4, 1, 2, 3 (the first of equals first).
    scores = rank_scores(np.array([0.1, 0.9, 0.5, 0.5], np.float32))
    assert scores.tolist() == [0, 50 * 9, 50 * 4, 50 * 1]
    boxes = np.array([[0, 0, 6, 1], [0, 0, 2, 1], [1, 0, 4, 1], [3, 0, 6, 1]])
    summed, count = painted(boxes, scores, 6, 1)
    assert summed.tolist() == [[450, 450 + 200, 200, 200 + 50, 50, 50]]
    assert count.tolist() == [[2, 3, 2, 3, 2, 2]]


def test_only_the_best_count_where_a_network_shows_so_many():
    assert rank_scores(np.array([1.0, 4.0, 3.0, 2.0]), most=2).tolist() == [0, LAMBDA, 0, 0]
    assert rank_scores(np.array([1.0, 2.0]), most=50).tolist() == [0, LAMBDA]


def test_painting_agrees_with_a_loop_over_pixels():
    chance = np.random.default_rng(3)
    corners = np.sort(chance.uniform(-3, 24, size=(40, 2, 2)), axis=1)
    boxes, scores = corners.reshape(40, 4), chance.integers(0, 1000, 40)
    summed, count = painted(boxes, scores, 20, 17)
    wanted = np.zeros((2, 17, 20), np.int64)
    for (x1, y1, x2, y2), score in zip(np.floor(boxes + 0.5).astype(int), scores, strict=True):
        left, top = min(max(x1, 0), 19), min(max(y1, 0), 16)
        for y in range(top, max(min(y2, 17), top + 1)):
            for x in range(left, max(min(x2, 20), left + 1)):
                wanted[:, y, x] += (score, 1)
    np.testing.assert_array_equal(summed, wanted[0])
    np.testing.assert_array_equal(count, wanted[1])


def nodes(products, boxes, **options):
    """Nodes of two dimensions whose products with (1, 0) are as given."""
    vectors = np.array([[value, 7.0] for value in products], np.float32)
    options = {"tiled": False, "view": (0.0, 0.0, 4.0, 2.0), **options}
    return Nodes(vectors=vectors, boxes=np.array(boxes, float), **options)


def looked(found):
    return AttentionMaps(width=4, height=2, embedding=np.array([1, 0], np.float32), nodes={"regional": found})


def test_a_map_runs_from_the_least_to_the_most_and_is_zero_where_nothing_was_seen():
    boxes = [[1, 0, 2, 2], [2, 0, 3, 2], [1, 0, 3, 1]]
    (heat,) = looked(nodes([3, 2, 1], boxes, view=(1.0, 0.0, 3.0, 2.0))).maps.values()
    # Scores 200, 50, 0: seen are the two middle columns.
    np.testing.assert_allclose(heat, [[0, 1, 0, 0], [0, 1, 0, 0]])
    assert heat.dtype == np.float32


def test_boxes_that_every_photograph_shares_are_averaged_so_that_overlap_says_nothing():
    # The middle lies in both boxes. Summed it would win; averaged it lies between them.
    boxes = [[0, 0, 3, 2], [1, 0, 4, 2]]
    summed = looked(nodes([2, 1], boxes)).heat("regional")
    averaged = looked(nodes([2, 1], boxes, tiled=True)).heat("regional")
    assert summed[0].tolist() == [1, 1, 1, 0]
    assert averaged[0].tolist() == [1, 0.5, 0.5, 0]


def test_another_vector_asks_for_other_places():
    found = looked(Nodes(
        vectors=np.eye(2, dtype=np.float32), boxes=np.array([[0, 0, 2, 2], [2, 0, 4, 2.0]]), tiled=True, view=(0, 0, 4, 2)
    ))  # fmt: skip
    assert found.maps["regional"][0].tolist() == [1, 1, 0, 0]
    assert found.towards(np.array([0, 1]))["regional"][0].tolist() == [0, 0, 1, 1]
    assert found.products("regional").tolist() == [1, 0]
    assert found.heat("regional", size=(2, 1)).tolist() == [[1, 0]]


# --- where the network looks: pre-processing undone ---


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (224, 224), (1000, 301)])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_a_mark_in_the_photograph_is_found_again_where_the_boxes_say(resize, size):
    """A white patch in the corner cell of what the network sees lies in that cell's box, mapped back."""
    preprocess = Preprocess(image_size=224, resize=resize, mean=(0, 0, 0), std=(1, 1, 1))
    left, top, right, bottom = preprocess.view(*size)
    assert 0 <= left < right <= size[0] + 1e-9
    assert 0 <= top < bottom <= size[1] + 1e-9
    for column, row in ((0, 0), (6, 0), (3, 6), (6, 6)):
        box = [left + (right - left) * column / 7, top + (bottom - top) * row / 7]
        box += [left + (right - left) * (column + 1) / 7, top + (bottom - top) * (row + 1) / 7]
        photograph = Image.new("RGB", size)
        photograph.paste("white", tuple(round(edge) for edge in box))
        pixels = preprocess(photograph)[0]
        cells = pixels.reshape(7, 32, 7, 32).mean(axis=(1, 3))
        assert np.unravel_index(cells.argmax(), cells.shape) == (row, column)
        assert cells[row, column] > 0.9
        cells[row, column] = 0
        assert cells.max() < 0.1


# --- the output of the graph ---


@pytest.mark.parametrize("name", [
    "image-grid-k1", "image-pyramid-no-jsr", "image-both-no-jsr", "image-both-k2", "image-both-k4", "image-files-k2",
])  # fmt: skip
def test_an_embedding_is_the_mean_of_its_nodes(name):
    torch = pytest.importorskip("torch")
    from .tiny_models import EXPORTED, image_encoder, images

    encoder = image_encoder(EXPORTED[name])
    inputs = images(encoder, 3)
    with torch.inference_mode():
        embedding, of_image = encoder.with_nodes(**inputs)
        assert torch.equal(embedding, encoder(**inputs))
    torch.testing.assert_close(of_image.mean(dim=1), embedding, rtol=0, atol=5e-7)
    known = [boxes for boxes in encoder.node_boxes.values() if boxes is not None]
    assert sum(map(len, known)) <= of_image.shape[1]


def test_the_graph_gives_torchs_nodes_and_the_same_embeddings(attentive, small_bundle, small_run, photos):
    torch = pytest.importorskip("torch")
    from dualmatch.training.checkpoint import load_run

    with ImageEncoder(attentive, attention=True, threads=1) as encoder, ImageEncoder(small_bundle, threads=1) as plain:
        prepared = [encoder.prepare(photo) for photo in photos]
        embeddings, found = encoder.encode_with_nodes(prepared)
        np.testing.assert_allclose(embeddings, plain.encode(photos), rtol=0, atol=1e-6)
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack([one["pixels"] for one in prepared]))
        wanted = load_run(small_run.folder).model.eval().image_encoder.with_nodes(pixels=pixels)[1].numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    groups = load_bundle(attentive).manifest.encoders["image"].nodes.groups
    assert [(group.kind, group.count, len(group.boxes)) for group in groups] == [
        ("global", 16, 16),
        ("regional", 14, 14),
    ]
    assert found.shape == (5, 30, 16)
    assert groups[0].boxes[:2] == ((0.0, 0.0, 0.25, 0.25), (0.25, 0.0, 0.5, 0.25)), "row by row"


def test_without_being_asked_only_the_embedding_is_fetched_and_a_plain_export_knows_nothing_of_it(
    attentive, small_bundle
):
    for backend in ("onnxruntime", "openvino"):
        if backend == "openvino":
            pytest.importorskip("openvino")
        with ImageEncoder(attentive, backend=backend) as encoder:
            assert [spec.name for spec in encoder.session.outputs] == ["image_embedding"]
            pixels = {"pixels": np.zeros((1, 3, 32, 32), np.float32)}
            assert list(encoder.session.run(pixels)) == ["image_embedding"]
        with ImageEncoder(attentive, backend=backend, attention=True) as encoder:
            assert list(encoder.session.run(pixels)) == ["image_embedding", "image_nodes"]
    assert has_attention(load_bundle(attentive))
    assert not has_attention(load_bundle(small_bundle))
    assert "nodes" not in json.loads((small_bundle / "manifest.json").read_text())["encoders"]["image"]


def test_a_photograph_looks_the_same_alone_and_in_company(attentive, photos):
    with ImageEncoder(attentive, attention=True, threads=1, batch_size=2) as encoder:
        together = attention_maps(encoder, photos)
        for photo, one in zip(photos, together, strict=True):
            (alone,) = attention_maps(encoder, [photo])
            assert (alone.width, alone.height) == Image.open(photo).size
            assert alone.kinds == ("global", "regional")
            for kind in alone.kinds:
                np.testing.assert_allclose(alone.products(kind), one.products(kind), rtol=0, atol=1e-5)
                np.testing.assert_array_equal(alone.maps[kind], one.maps[kind])
                assert alone.maps[kind].shape == (alone.height, alone.width)
                assert (alone.maps[kind].min(), alone.maps[kind].max()) == (0, 1)


def test_a_query_s_score_is_the_mean_of_its_nodes_products(attentive, photos):
    query = np.random.default_rng(1).standard_normal(16).astype(np.float32)
    with ImageEncoder(attentive, attention=True, threads=1) as encoder:
        (found,) = attention_maps(encoder, photos[:1])
    shares = np.concatenate([found.products(kind, query) for kind in found.kinds])
    assert shares.mean() == pytest.approx(found.embedding @ query, abs=1e-5)


# --- pictures ---


def test_brighter_means_more():
    table = colour_table().astype(float) / 255
    linear = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    steps = np.diff(lightness)
    assert (steps > 0).all()
    assert steps.max() < 2 * steps.mean(), "no step that looks like an edge"


def test_an_overlay_has_the_photograph_s_size_and_shows_both():
    photo = Image.new("RGB", (8, 4), "black")
    photo.paste("white", (4, 0, 8, 4))
    heat = np.zeros((2, 4), np.float32)
    heat[1] = 1
    drawn = np.asarray(overlay(photo, heat).convert("L")).astype(int)
    assert drawn.shape == (4, 8)
    assert drawn[3, 0] > drawn[0, 0] + 60, "hot is brighter than cold"
    assert drawn[0, 7] > drawn[0, 0] + 60, "and the photograph shines through"
    with pytest.raises(DualmatchError, match=r"is \(height, width\)"):
        overlay(photo, np.zeros(3))


# --- refusals ---


def test_a_bundle_without_nodes_says_how_to_get_them(small_bundle):
    with pytest.raises(DualmatchError, match=r"export it with `dualmatch export … --attention`"):
        ImageEncoder(small_bundle, attention=True)


def test_engines_and_encoders_opened_without_say_so(attentive, photos):
    with pytest.raises(DualmatchError, match="--backend onnxruntime"):
        ImageEncoder(attentive, attention=True, backend="tensorrt")
    with ImageEncoder(attentive) as encoder, pytest.raises(DualmatchError, match="opened without"):
        attention_maps(encoder, photos)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found["groups"][0].update(count=15), "boxes for its 15 global|its groups are 15 global"),
        (lambda found: found["groups"][0]["boxes"].pop(), "has 15 boxes for its 16 global nodes"),
        (lambda found: found["groups"][1]["boxes"][0].__setitem__(2, 1.5), "not within 0 and 1"),
        (lambda found: found["groups"][1].update(kind="global"), "16 global, 14 global"),
        (lambda found: found["output"].update(shape=["batch", 30, 8]), "of 16 components"),
        (lambda found: found.update(groups=[]), "none nodes"),
    ],
)
def test_a_manifest_whose_nodes_do_not_fit_is_refused(attentive, tmp_path, change, said):
    bundle = tmp_path / "bundle"
    shutil.copytree(attentive, bundle)
    edit_manifest(bundle, lambda values: change(values["encoders"]["image"]["nodes"]))
    with pytest.raises(DualmatchError, match=said):
        load_bundle(bundle)


def test_no_torch_is_needed(attentive, photos):
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'matplotlib'): sys.modules[name] = None\n"
        "from dualmatch.runtime import ImageEncoder\n"
        "from dualmatch.runtime.attention import attention_maps\n"
        "with ImageEncoder(sys.argv[1], attention=True, threads=1) as encoder:\n"
        "    print(*attention_maps(encoder, [sys.argv[2]])[0].maps)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, attentive, photos[0]], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["global", "regional"], done.stderr


# --- engines leave the nodes out ---


def test_an_engine_gives_the_embedding_alone_and_so_does_the_one_that_its_script_builds(attentive, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="not run: tensorrt-rtx is not installed")
    from dualmatch.export.compile import compile_bundle
    from dualmatch.export.engine import build_engine
    from dualmatch.export.engine_profiles import profile_from_text

    bundle = tmp_path / "bundle"
    shutil.copytree(attentive, bundle)
    compile_bundle(bundle, flavour="tensorrt-rtx", profiles=["latency"])
    engines = bundle / "engines"
    script = engines / "image_encoder.tensorrt-rtx.reproduce.py"
    done = subprocess.run([sys.executable, script, tmp_path / "again"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    entry = load_bundle(bundle).manifest.encoders["image"]
    build_engine(
        bundle / entry.file,
        tmp_path / "both",
        flavour="tensorrt-rtx",
        inputs=entry.inputs,
        profiles=[profile_from_text("latency", entry.inputs, length=None)],
    )
    # No engine can be opened without a GPU; but a plan names its tensors.
    for path, named in (
        (engines / "image_encoder.tensorrt-rtx.engine", False),
        (tmp_path / "again", False),
        (tmp_path / "both", True),
    ):
        plan = path.read_bytes()
        assert b"image_embedding" in plan
        assert (b"image_nodes" in plan) == named, path
    assert "image_nodes" not in (engines / "text_encoder.tensorrt-rtx.reproduce.py").read_text()


# --- regions from a file ---


@pytest.fixture(scope="session")
def vsrn(tmp_path_factory):
    """A VSRN on regions from a file, exported with its nodes: (bundle, region file, data folder)."""
    pytest.importorskip("onnxscript")
    from dualmatch.export.bundle import export_run
    from dualmatch.runtime.datasets import make_scenes, open_dataset
    from dualmatch.training.checkpoint import load_run
    from dualmatch.training.loop import train
    from dualmatch.training.recipe import load_recipe

    from .demo_fixture import write_captions_folder
    from .tiny_runs import write_regions

    root = tmp_path_factory.mktemp("vsrn")
    data = write_captions_folder(root / "data", make_scenes(num_train=16, num_val=4, num_test=4).items)
    dataset = open_dataset(data)
    chance = np.random.default_rng(5)
    corners = np.sort(chance.uniform(size=(len(dataset.items), 6, 2, 2)), axis=2).reshape(-1, 6, 4)
    positions = np.concatenate([corners, np.zeros((len(corners), 6, 2))], axis=2).astype(np.float32)
    file = write_regions(root / "regions.npz", dataset, regions=6, positions=positions)
    options = [
        "train.epochs=1", "train.batch_size=8", 'data.train_splits=["train"]', f"data.regions={file}", "data.min_word_count=1",
        "model.feature_dim=10", "model.embed_dim=16",
        "model.captioning.hidden_dim=8", "model.captioning.word_dim=8",
    ]  # fmt: skip
    train(load_recipe("flickr8k-vsrn", options), dataset, root / "run", data_name=str(data), cache=root / "cache")
    export_run(load_run(root / "run"), dataset, root / "bundle", regions=RegionFile(file), attention=True)
    return root / "bundle", file, data


def test_vsrn_s_regions_are_ranked_by_their_product_with_the_image(vsrn):
    torch = pytest.importorskip("torch")
    from dualmatch.training.checkpoint import load_run

    bundle, file, data = vsrn
    regions = RegionFile(file)
    photo = min((data / "images").iterdir())
    with ImageEncoder(bundle, attention=True, regions=regions) as encoder:
        (found,) = attention_maps(encoder, [photo])
    model = load_run(bundle.parent / "run").model.eval().image_encoder
    with torch.inference_mode():
        v_star = model.relate(torch.from_numpy(regions.features(photo.name))[None])
        products = (v_star @ model.summarise(v_star)[0])[0].numpy()
    assert found.kinds == ("regional",)
    np.testing.assert_allclose(found.products("regional"), products, rtol=0, atol=1e-5)
    # The map once more, as section 4.5 says it: region by region, pixel by pixel.
    width, height = Image.open(photo).size
    wanted = np.zeros((height, width))
    for rank, region in enumerate(np.argsort(-products), start=1):
        x1, y1, x2, y2 = regions.positions(photo.name)[region, :4] * np.array([width, height] * 2)
        for y in range(height):
            for x in range(width):
                wanted[y, x] += 50 * (6 - rank) ** 2 * (x1 <= x + 0.5 < x2 and y1 <= y + 0.5 < y2)
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    np.testing.assert_allclose(found.maps["regional"], wanted, atol=1e-6)


def test_a_region_file_without_boxes_is_named(vsrn, tmp_path):
    bundle, file, data = vsrn
    with np.load(file) as arrays:
        np.savez(tmp_path / "bare.npz", filenames=arrays["filenames"], features=arrays["features"])
    photo = min((data / "images").iterdir())
    with (
        ImageEncoder(bundle, attention=True, regions=RegionFile(tmp_path / "bare.npz")) as encoder,
        pytest.raises(DualmatchError, match=r"bare.npz does not tell where its regions lie"),
    ):
        attention_maps(encoder, [photo])


# --- `search --explain` ---


@pytest.fixture(scope="session")
def galleries(attentive, small_run, tmp_path_factory):
    from dualmatch.runtime.encode import encode_caption_gallery, encode_gallery

    folder, bundle = tmp_path_factory.mktemp("galleries"), load_bundle(attentive)
    encode_gallery(bundle, small_run.data / "images", folder / "images")
    encode_caption_gallery(bundle, small_run.data / "captions.json", folder / "captions")
    return folder


def labels(page):
    return re.findall(r"<figcaption>(.*?)</figcaption>", page.read_text())


def test_search_draws_where_the_network_looks(galleries, photos, tmp_path):
    page = tmp_path / "hits.html"
    images = galleries / "images"
    done = dualmatch("runtime", "search", images, "--text", "a red car", "-k", 3, "--sheet", page, "--explain")
    assert done.code == 0, done.err
    four = ["looks at: regions", "looks at: grid", "fits query: regions", "fits query: grid"]
    assert labels(page) == 3 * four
    text = page.read_text()
    assert text.count("<img") == 3 * 5
    assert "with the photograph&#x27;s own embedding" in text
    plain = dualmatch("runtime", "search", images, "--text", "a red car", "-k", 3, "--json").json
    assert dualmatch(
        "runtime", "search", images, "--text", "a red car", "-k", 3, "--json", "--sheet", tmp_path / "hits.png", "--explain"
    ).json == plain  # fmt: skip
    assert Image.open(tmp_path / "hits.png").height > 3 * 98


def test_what_is_drawn_for_the_query_is_the_query_s(attentive, galleries, photos):
    """The pictures, made once more from their parts."""
    bundle = load_bundle(attentive)
    query = Query(texts=("a person at night",))
    hits = search_all(Gallery.open(galleries / "images"), bundle, [query], k=2)
    ((first, _),) = explained(bundle, [query], hits)
    with ImageEncoder(bundle, attention=True) as encoder, TextEncoder(bundle) as texts:
        (found,) = attention_maps(encoder, [first.image])
        (vector,) = texts.encode(query.texts)
    photograph = ImageOps.contain(open_rgb(first.image), (HTML_THUMBNAIL, HTML_THUMBNAIL))
    pictures = dict(first.pictures)
    for label, kind, towards in (("looks at: grid", "global", None), ("fits query: regions", "regional", vector)):
        wanted = overlay(photograph, found.heat(kind, vector=towards, size=photograph.size))
        assert pictures[label].size == wanted.size
        np.testing.assert_array_equal(np.asarray(pictures[label]), np.asarray(wanted))


def test_captions_found_for_a_photograph_are_shown_on_it(galleries, photos, tmp_path):
    page = tmp_path / "captions.html"
    done = dualmatch(
        "runtime", "search", galleries / "captions", "--image", photos[0], "-k", 2, "--sheet", page, "--explain"
    )
    assert done.code == 0, done.err
    assert labels(page) == 2 * ["fits caption: regions", "fits caption: grid"]


def test_photographs_that_are_gone_are_named_and_the_others_drawn(attentive, galleries, photos):
    hits = [
        Hit(score=0.9, id="gone.png", image=photos[0].with_name("gone.png")),
        Hit(score=0.8, id=photos[0].name, image=photos[0]),
    ]
    ((gone, there),) = explained(load_bundle(attentive), [Query(texts=("a car",))], [hits])
    assert (len(gone.pictures), len(there.pictures)) == (0, 4)


def test_explaining_refuses_in_a_sentence(galleries, small_bundle, small_run, tmp_path):
    from dualmatch.runtime.encode import encode_gallery

    nothing = dualmatch(
        "runtime", "search", galleries / "captions", "--text", "x", "--sheet", tmp_path / "s.html", "--explain"
    )
    assert nothing.code == 1
    assert one_sentence(nothing.err)
    assert "no photograph to draw attention on" in nothing.err
    no_sheet = dualmatch("runtime", "search", galleries / "images", "--text", "x", "--explain")
    assert no_sheet.code == 2
    assert "--explain draws on the sheet" in no_sheet.err
    encode_gallery(load_bundle(small_bundle), small_run.data / "images", tmp_path / "plain")
    plain = dualmatch(
        "runtime", "search", tmp_path / "plain", "--text", "x", "--sheet", tmp_path / "s.html", "--explain"
    )
    assert plain.code == 1
    assert one_sentence(plain.err)
    assert "export it with `dualmatch export … --attention`" in plain.err
    assert not (tmp_path / "s.html").exists()


# What the small run's dozens of images can show.
LOOSE = ("--unverified", "--max-rsum-loss", 600, "--min-cosine", 0.99)


def test_export_takes_the_option(small_run, tmp_path):
    done = dualmatch("export", small_run.folder, "--out", tmp_path / "b", "--fp16", "--attention", *LOOSE)
    assert done.code == 0, done.err
    nodes = load_bundle(tmp_path / "b").manifest.encoders["image"].nodes
    assert 0 < nodes.measured <= nodes.tolerance == 3e-2
    assert "image_nodes" in done.out
    verified = dualmatch("runtime", "verify", tmp_path / "b", "--data", small_run.data)
    assert "in image_nodes differ from torch by at most" in verified.out


def test_greying_out_is_measured_on_the_network_s_own_pixels(attentive, small_run):
    from dualmatch.bench.attention import falls, greyed

    pixels = np.ones((3, 8, 8), np.float32)
    changed = greyed(pixels, np.array([[0.0, 0.25, 0.5, 0.5], [0.75, 0.75, 1.0, 1.0]]))
    assert changed.sum() == 3 * (64 - 8 - 4)
    assert (changed[:, 2:4, :4].sum(), changed[:, 6:, 6:].sum(), pixels.sum()) == (0, 0, 192)
    found = falls(attentive, str(small_run.data), splits=["train", "val"], photographs=6, threads=1)
    assert {name: len(values) for name, values in found.items()} == {"best": 6, "random": 6, "worst": 6}
    assert all(np.isfinite(values).all() for values in found.values())
    assert not np.array_equal(found["best"], found["worst"])
