"""Exact search by every engine against sorting everything, and the approximate index: recall, filters, staleness, damage."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries import ann, exact
from dualmatch.runtime.galleries.edit import compact, remove_items
from dualmatch.runtime.galleries.filters import parse, read_metadata, select
from dualmatch.runtime.galleries.gallery import Gallery

from .demo_fixture import dualmatch, one_sentence
from .gallery_tables import unit_table, write_table

engines = pytest.mark.parametrize("engine", exact.ENGINES)


def by_sorting(queries, vectors, k, among=None):
    scores = np.vecdot(vectors[None].astype(np.float32), queries[:, None])
    if among is not None:
        scores[:, ~among] = -np.inf
        k = min(k, int(among.sum()))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """1500 vectors of 24 dimensions, float16, in shards of 256; some removed, some twice."""
    table = unit_table(1500, 24)
    table[700:760] = table[40:100]
    out = tmp_path_factory.mktemp("exact") / "g"
    write_table(out, table, batch_size=32, rows_per_shard=256)
    remove_items(out, [f"c{row}" for row in (0, 41, 300, 301, 302, 1499)])
    return Gallery.open(out)


@engines
@pytest.mark.parametrize("num_queries", [1, 3, 70])
@pytest.mark.parametrize("k", [1, 10, 400, 5000])
def test_every_engine_finds_what_sorting_finds(gallery, engine, num_queries, k):
    if engine == "numkong":
        pytest.importorskip("numkong")
    queries = np.concatenate([unit_table(num_queries, 24, seed=3), gallery.vectors()[40:41]])  # one with an equal
    scores, positions = gallery.search(queries, k, engine=engine)
    wanted_scores, wanted = by_sorting(queries, gallery.vectors(), k)
    assert positions.tolist() == wanted.tolist()
    assert scores.tolist() == wanted_scores.tolist()


@engines
def test_only_what_is_asked_for_is_searched(gallery, engine):
    if engine == "numkong":
        pytest.importorskip("numkong")
    among = np.random.default_rng(0).random(len(gallery)) < 0.1
    queries = unit_table(5, 24, seed=4)
    scores, positions = gallery.search(queries, 12, among=among, engine=engine, threads=3)
    wanted_scores, wanted = by_sorting(queries, gallery.vectors(), 12, among)
    assert positions.tolist() == wanted.tolist()
    assert scores.tolist() == wanted_scores.tolist()
    nothing = gallery.search(queries, 12, among=np.zeros(len(gallery), bool), engine=engine)
    assert nothing[1].shape == (5, 0)


def test_a_score_does_not_depend_on_company_blocks_or_threads(gallery, monkeypatch):
    queries = unit_table(40, 24, seed=5)
    together = gallery.search(queries, 7)
    monkeypatch.setattr("dualmatch.runtime.galleries.gallery.SEARCH_BLOCK_BYTES", 4 * 24 * 37)
    monkeypatch.setattr(exact, "SCORE_BYTES", 4 * 37 * 3)
    alone = [gallery.search(queries[[row]], 7, threads=4) for row in range(40)]
    assert np.array_equal(together[0], np.concatenate([scores for scores, _ in alone]))
    assert np.array_equal(together[1], np.concatenate([positions for _, positions in alone]))


@engines
def test_more_equals_than_candidates_still_come_by_position(tmp_path, engine):
    """A placeholder picture stands in a gallery a hundred times."""
    if engine == "numkong":
        pytest.importorskip("numkong")
    table = unit_table(300, 16)
    table[50:150] = table[7]
    gallery = write_table(tmp_path / "g", table, batch_size=50, rows_per_shard=100)
    _, positions = gallery.search(gallery.vectors()[[7]], 30, engine=engine)
    assert positions[0].tolist() == [7, *range(50, 79)]


@engines
def test_more_asked_for_than_candidates_are_kept_is_still_exact(tmp_path, engine):
    if engine == "numkong":
        pytest.importorskip("numkong")
    queries, k = unit_table(1, 16, seed=9), exact.MAX_CANDIDATES - 6
    # All of them equally far from the query, in all directions: rounded to float16, it would confuse hundreds.
    table = unit_table(6000, 16)
    table = (table - (table @ queries.T) * queries) / 2 + queries / 2
    gallery = write_table(tmp_path / "g", table, batch_size=500, rows_per_shard=1000)
    scores, positions = gallery.search(queries, k, engine=engine, threads=3)
    wanted_scores, wanted = by_sorting(queries, gallery.vectors(), k)
    assert positions.tolist() == wanted.tolist()
    assert scores.tolist() == wanted_scores.tolist()


@engines
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e6, 1e30])
def test_long_and_short_queries_rank_alike(gallery, engine, scale):
    if engine == "numkong":
        pytest.importorskip("numkong")
    queries = unit_table(3, 24, seed=6)
    wanted = gallery.search(queries, 10)[1]
    assert gallery.search(queries * np.float32(scale), 10, engine=engine)[1].tolist() == wanted.tolist()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**16 - 1), st.integers(1, 3))
def test_widening_is_exact_for_every_finite_float16(first, step):
    bits = ((first + step * np.arange(4096)) % 2**16).astype(np.uint16)
    half = bits.view(np.float16).reshape(64, 64)
    half = np.where(np.isfinite(half), half, np.float16(0))
    wide = np.empty(half.shape, np.float32)
    exact.widen(half, wide)
    assert np.array_equal(np.ldexp(wide, exact.HALF_SCALE), half.astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damage_in_float16_that_would_rank_first_is_noticed(tmp_path, value):
    gallery = write_table(tmp_path / "g", unit_table(20))
    path = tmp_path / "g" / "vectors-00001.npy"
    data = bytearray(path.read_bytes())
    data[-32:] = np.full(16, value, np.float16).tobytes()
    path.write_bytes(data)
    queries = np.array([np.ones(16), -np.ones(16)], np.float32)
    with pytest.raises(DualmatchError, match="NaN or infinity"):
        gallery.search(queries, 3)


def test_the_engine_is_chosen_by_size_and_number_of_queries(monkeypatch):
    half, single = np.dtype(np.float16), np.dtype(np.float32)
    monkeypatch.setattr(exact, "find_spec", lambda _name: object())
    assert exact.choose_engine(1, 2**31, half) == "numkong"
    assert exact.choose_engine(64, 2**31, half) == "numkong"
    assert exact.choose_engine(1000, 2**31, half) == "numpy"
    assert exact.choose_engine(1, 2**20, half) == "numpy"
    assert exact.choose_engine(1, 2**31, single) == "numpy"
    monkeypatch.setattr(exact, "find_spec", lambda _name: None)
    assert exact.choose_engine(1, 2**31, half) == "numpy"


def test_many_shards_do_not_use_up_the_file_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr("dualmatch.runtime.galleries.gallery.MAPPED_SHARDS", 4)
    gallery = write_table(tmp_path / "g", unit_table(60), batch_size=1, rows_per_shard=2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert gallery.search(gallery.vectors(), 1)[1][:, 0].tolist() == list(range(60))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4


# The approximate index


@pytest.fixture
def indexed(tmp_path):
    pytest.importorskip("faiss")
    table = unit_table(2000, 32)
    gallery = write_table(tmp_path / "g", table, batch_size=50, rows_per_shard=500)
    return gallery, ann.build(gallery.path, effort=32)


def test_recall_is_what_it_says_and_scores_are_exact(indexed):
    gallery, record = indexed
    index = ann.AnnIndex.open(gallery)
    queries = unit_table(100, 32, seed=7)
    scores, positions = index.search(queries, 10)
    exact_scores, exact_positions = gallery.search(queries, 10)
    overlap = np.mean(
        [len({*a} & {*b}) / 10 for a, b in zip(positions.tolist(), exact_positions.tolist(), strict=True)]
    )
    assert overlap > 0.8
    own = gallery.vectors_at(np.sort(np.random.default_rng(0).choice(2000, 256, replace=False)))
    assert record.recall == pytest.approx(ann.recall_of(index, own))
    assert record.recall < 1  # random vectors are hard: an index that always answers exactly is none
    same = positions == exact_positions
    assert same.any()
    assert np.array_equal(scores[same], exact_scores[same])
    assert ann.recall_of(ann.AnnIndex.open(gallery), queries) <= ann.recall_of(_effort(gallery, 512), queries)


def _effort(gallery, effort):
    index = ann.AnnIndex.open(gallery)
    index.record = ann.AnnRecord(**{**vars(index.record), "effort": effort})
    return index


def test_filters_hold_in_the_approximate_index_too(indexed):
    gallery, _ = indexed
    among = np.arange(2000) % 2 == 1
    positions = ann.AnnIndex.open(gallery).search(unit_table(20, 32, seed=8), 10, among=among)[1]
    assert (positions % 2 == 1).all()


def test_a_changed_gallery_refuses_its_old_index(indexed):
    gallery, _ = indexed
    remove_items(gallery.path, ["c5"])
    changed = Gallery.open(gallery.path)
    with pytest.raises(DualmatchError, match=r"has changed since .*gallery index"):
        ann.AnnIndex.open(changed)
    assert "build it again" in ann.check(changed)
    (gallery.path / ".ann-0123456789ab.faiss.part").write_text("left by a killed build")
    record = ann.build(gallery.path)
    assert ann.AnnIndex.open(Gallery.open(gallery.path)).search(unit_table(1, 32), 3)[1].shape == (1, 3)
    assert [path.name for path in gallery.path.iterdir() if "ann-" in path.name] == [record.file]
    compact(gallery.path)
    with pytest.raises(DualmatchError, match="has changed since"):
        ann.AnnIndex.open(Gallery.open(gallery.path))


def test_a_missing_or_damaged_index_is_said_to_be_so(indexed, tmp_path):
    gallery, record = indexed
    with pytest.raises(DualmatchError, match="has no approximate index"):
        ann.AnnIndex.open(write_table(tmp_path / "h", unit_table(8)))
    file = gallery.path / record.file
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"\x01")
    with pytest.raises(DualmatchError, match="missing or damaged"):
        ann.check(gallery)
    file.write_bytes(data[:1000])
    with pytest.raises(DualmatchError, match="missing or damaged"):
        ann.AnnIndex.open(gallery)
    file.unlink()
    with pytest.raises(DualmatchError, match="missing or damaged"):
        ann.AnnIndex.open(gallery)
    values = json.loads((gallery.path / "ann.json").read_text())
    for change in ({"file": "../../x.faiss"}, {"effort": "64"}, {"version": 9}, {"extra": 1}):
        (gallery.path / "ann.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(DualmatchError, match="damaged"):
            ann.AnnIndex.open(gallery)


# Filters


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("id=c3", [3]),
        ("id!=c3", [0, 1, 2, *range(4, 12)]),
        ("id~c1*", [1, 10, 11]),
        ("row>=10", [10, 11]),
        (" row < 2 ", [0, 1]),
        ("image=1.jpg", [5, 6, 7, 8, 9]),
        ("year>2000", [2, 3]),
        ("year=1999", [1]),
        ("year!=1999", [0, *range(2, 12)]),
        ("tags=dog", [1, 2]),
        ("tags!=dog", [0, *range(3, 12)]),
        ("place=Ende = Anfang", [4]),
        ("day<2021-05-01", [5]),
        ("ok=true", [6]),
        ("code=007", [7]),
    ],
)
def test_conditions(tmp_path, condition, rows):
    gallery = write_table(tmp_path / "g", unit_table(12))
    metadata = tmp_path / "m.jsonl"
    entries = [
        {"id": "c1", "year": 1999, "tags": ["dog", "cat"]}, {"id": "c2", "year": 2001, "tags": ["dog"]},
        {"id": "c3", "year": 2010.5, "tags": []}, {"id": "c4", "place": "Ende = Anfang"},
        {"id": "c5", "day": "2021-04-30"}, {"id": "c6", "ok": True, "day": "2021-05-01"}, {"id": "c7", "code": "007"},
        {"id": "elsewhere", "year": 1},
    ]  # fmt: skip
    metadata.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert np.flatnonzero(select(gallery, [condition], metadata)).tolist() == rows


@pytest.mark.parametrize(
    ("conditions", "lines", "message"),
    [
        (["year"], None, "is not FIELD=VALUE"),
        (["=5"], None, "is not FIELD=VALUE"),
        (["year=5"], None, "no item has a field 'year'; there are caption, id, image, row"),
        (["id=c1", "id=c2"], None, "no item fulfils 'id=c1' and 'id=c2'"),
        (["year=5"], '{"id": "x", "year": 5}', "names none of the 4 items"),
        (["year=5"], '{"year": 5}', "line 1: expected an object with an 'id'"),
        (["year=5"], '{"id": "c1"}\n{"id": "c1"}', "line 2: the id 'c1' occurs twice"),
        (["year=5"], '{"id": "c1", "caption": "x"}', "'caption' is the item's own"),
        (["year=5"], '{"id": "c1"', "line 1: not JSON"),
    ],
)
def test_filters_that_cannot_be_meant(tmp_path, conditions, lines, message):
    gallery = write_table(tmp_path / "g", unit_table(4))
    if lines is not None:
        (tmp_path / "m.jsonl").write_text(lines)
    with pytest.raises(DualmatchError, match=message):
        select(gallery, conditions, None if lines is None else tmp_path / "m.jsonl")


@given(st.text(max_size=20))
def test_any_text_is_a_condition_or_refused(text):
    with contextlib.suppress(DualmatchError):
        parse(text)[1]({"a": 1, "b": "x", "c": [1, "y"]})


def test_metadata_that_cannot_be_read(tmp_path):
    with pytest.raises(DualmatchError, match="cannot be read"):
        read_metadata(tmp_path / "none.jsonl")


# The command line


def test_index_and_search_by_command(tmp_path, small_bundle, small_run):
    pytest.importorskip("faiss")
    out = tmp_path / "g"
    assert dualmatch("runtime", "encode-gallery", small_bundle, small_run.data / "images", "--out", out).code == 0
    captions = dualmatch(
        "runtime", "encode-captions", small_bundle, small_run.data / "captions.json", "--out", tmp_path / "c"
    )
    assert captions.code == 0
    without = dualmatch("runtime", "search", out, "--text", "a ball", "--ann")
    assert (without.code, one_sentence(without.err)) == (1, True)
    built = dualmatch("gallery", "index", out, "--queries", tmp_path / "c")
    assert built.code == 0, built.err
    assert "recall@10 1.000 against exact search on a sample of captions" in built.out
    exactly = dualmatch("runtime", "search", out, "--text", "a ball", "--json", "--filter", "id~*1*", "--top", "4")
    nearly = dualmatch(
        "runtime", "search", out, "--text", "a ball", "--json", "--filter", "id~*1*", "--top", "4", "--ann"
    )
    assert exactly.json == nearly.json
    assert all("1" in hit["id"] for hit in nearly.json)
    spoken = dualmatch("runtime", "search", out, "--text", "a ball", "--ann")
    assert "by approximate index: recall@10 1.000" in spoken.err
    assert "approximate index: recall@10" in dualmatch("gallery", "check", out).out
