"""The benchmarks that run as `python -m dualmatch.bench.NAME`, at tiny sizes: they end, and what they compare gives the same answers."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from dualmatch.bench import bare_loop, encode, ranking

from .demo_fixture import write_captions_folder


def ran(name, *arguments):
    """`python -m dualmatch.bench.NAME`, with one thread."""
    command = [sys.executable, "-m", f"dualmatch.bench.{name}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def invoked(command, *arguments):
    done = CliRunner().invoke(command, [str(one) for one in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_search_finds_what_the_other_libraries_find(tmp_path):
    sizes = ("--vectors", 3000, "--dimension", 32, "--threads", 1, "--repeats", 3)
    ran("search", tmp_path / "g", *sizes, "--queries", 1, "--queries", 5, "--json", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    others = ("faiss flat float32", "faiss scalar float16", "usearch exact float16")
    assert [(row["other"], row["queries"]) for row in report["rows"]] == [(name, n) for name in others for n in (1, 5)]
    for row in report["rows"]:
        assert row["same_top10"] >= 0.9  # float16 products are rounded in other places
        assert {row["other"], f"dualmatch, {row['chosen']}"} < set(row["seconds"])
    without = subprocess.run(
        [sys.executable, "-m", "dualmatch.bench.search", tmp_path / "g", "--threads", "3"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert (without.returncode, "start with OMP_NUM_THREADS=3" in without.stderr) == (2, True)


def test_approximate_indexes_come_near_the_exact_answer(tmp_path):
    ran("ann", "--vectors", 2000, "--dimension", 16, "--threads", 1, "--json", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    for name in {row["index"] for row in rows}:
        recalls = [row["recall"] for row in rows if row["index"] == name]
        assert recalls[-1] > 0.9, name
        assert recalls[-1] >= max(recalls) - 0.01, name  # the most effort finds the most


def test_ranking_is_the_loops_ranking():
    sizes = ("--images", 60, "--dimension", 16, "--rounds", 1, "--loop-rounds", 1)
    report = json.loads(invoked(ranking.main, *sizes, "--json"))
    # (Scores made in blocks may be rounded otherwise by some BLAS, so what is streamed need not be the same to the last rank.)
    assert report["identical"]["ranks_as_loops"]
    assert report["identical"]["reranking_as_loops"]
    assert report["recall"]["protocol"]["rerank"] == "i2t k1=15"
    assert "ranks as loops: identical" in invoked(ranking.main, *sizes)


def test_the_harness_is_held_against_a_bare_loop(small_bundle):
    lines = invoked(bare_loop.main, small_bundle, "--rounds", 2).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["image", "text"]


@pytest.mark.parametrize("what", ["speed", "captions"])
def test_encoding_is_measured_beside_the_bare_model(small_bundle, small_run, tmp_path, what):
    photos = write_captions_folder(tmp_path / "photos", small_run.dataset.items[:12])
    place = photos / "images" if what == "speed" else photos / "captions.json"
    sizes = ("--count", 12, "--rounds", 2, "--batch-size", 4, "--json", tmp_path / "out.json")
    invoked(encode.cli, what, small_bundle, place, *sizes, *(["--no-loader"] if what == "speed" else []))
    assert {"bare model", "pipeline"} <= set(json.loads((tmp_path / "out.json").read_text())["per second"])
