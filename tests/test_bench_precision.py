"""The benchmarks behind docs/precision.md: a row for each precision, refused ones too, and the whole evaluation against the authors' loop."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dualmatch.bench import evaluation, precision
from dualmatch.runtime.bundle import load_bundle


@pytest.fixture(scope="module")
def rows(small_run, small_bundle, tmp_path_factory):
    """The small run at fp32 from a bundle that is there, and at int8 from an export that these few pairs cannot pass."""
    folder = tmp_path_factory.mktemp("precisions")
    (folder / "fp32").symlink_to(small_bundle)
    arguments = [small_run.folder, "--data", small_run.data, "--bundles", folder, "--precisions", "fp32,int8"]
    arguments += ["--batches", "2", "--threads", "1", "--rounds", "4", "--json", folder / "report.json"]
    done = CliRunner().invoke(precision.main, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    return json.loads((folder / "report.json").read_text()), done.output


def test_a_row_has_the_bundles_figures(rows, small_bundle):
    report, printed = rows
    found, manifest = report["exports"]["fp32"], load_bundle(small_bundle).manifest
    assert found["bundle"]
    assert found["rsum_after"] == manifest.parity["comparison"]["after"]["rsum"]
    assert found["mib"]["image"] == round((small_bundle / "image_encoder.onnx").stat().st_size / 2**20, 2)
    row = next(line for line in printed.splitlines() if line.startswith(f"| {manifest.model['recipe']} | fp32 |"))
    assert f"| {found['rsum_after']:.1f} |" in row
    low, high = manifest.parity["comparison"]["rsum_change_interval"]
    assert low <= found["rsum_change"] <= high
    assert f"{found['rsum_change']:+.2f} [{low:+.2f}, {high:+.2f}] ({found['bound_of_loss']:.2f})" in row
    assert row.endswith("| pass | - |")  # from a bundle that was there: no export was measured


def test_ratios_are_of_the_latencies_taken_in_turns(rows):
    report, _ = rows
    assert [(case["encoder"], case["batch"]) for case in report["cases"]] == [("image", 2), ("text", 2)]
    for case in report["cases"]:
        assert {len(taken) for taken in case["raw_s"].values()} == {4}
        value, low, high = case["faster_than_torch"]["fp32"]
        assert value == pytest.approx(np.median(case["raw_s"]["torch"]) / np.median(case["raw_s"]["fp32"]))
        assert low <= value <= high
    assert "torch 2" in report["cases"][0]["providers"]["torch"]


def test_a_refused_precision_is_a_row_without_figures(rows):
    report, printed = rows
    assert not report["exports"]["int8"]["bundle"]
    assert "int8" not in report["cases"][0]["faster_than_torch"]
    row = next(line for line in printed.splitlines() if "| int8 |" in line)
    found = report["exports"]["int8"]
    assert row.endswith(f"| {found['verdict']} | {found['export_seconds']:.0f}, {found['export_peak_mib']} |")
    assert 200 < found["export_peak_mib"] < 8000
    assert report["exports"]["int8"]["verdict"] != "pass"


def test_an_unknown_precision_is_named(small_run):
    done = CliRunner().invoke(
        precision.main, [str(small_run.folder), "--data", str(small_run.data), "--precisions", "fp8"]
    )
    assert "there is no precision 'fp8'; choose among fp32, fp16, int8." in str(done.exception) + done.output


def evaluated(run: Path, bundle: Path, data: Path, out: Path, *options: str):
    arguments = [run, bundle, "--data", data, "--threads", "1", "--json", out, *options]
    return CliRunner().invoke(evaluation.main, [str(one) for one in arguments])


def test_the_whole_evaluation_ranks_as_torch_does(small_run, small_bundle, tmp_path):
    done = evaluated(small_run.folder, small_bundle, small_run.data, tmp_path / "out.json", "--whole")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["images"], report["captions"]) == (52, 260)
    assert report["baseline_s"]["timed_pairs"] == 260
    assert not report["baseline_s"]["extrapolated"]
    assert report["speedup"] == pytest.approx(report["baseline_s"]["all"] / report["ours_s"]["all"])
    assert report["ranks"]["queries"] == 52 + 260
    assert report["ranks"]["moved_beyond_rounding"] == 0
    assert "260 captions" in done.output


def test_an_extrapolation_says_so(small_run, small_bundle, tmp_path):
    done = evaluated(small_run.folder, small_bundle, small_run.data, tmp_path / "out.json", "--baseline-batches", "1")
    baseline = json.loads((tmp_path / "out.json").read_text())["baseline_s"]
    assert baseline["all"] == pytest.approx(baseline["timed"] * 260 / 128)
    assert "extrapolated from 128 pairs" in done.output


def test_ranks_that_moved_are_told_from_rounding():
    owners = np.array([0, 1])
    before = np.array([[1.0, 0.5], [0.5, 1.0]], np.float32)
    by_rounding, by_more = before.copy(), before.copy()
    before[0, 1] = 1.0 - 1e-6
    by_rounding[0, 1] = 1.0 + 1e-6
    by_more[0, 1] = 1.1
    assert evaluation._rank_changes(before, before, owners)["moved"] == 0
    # What moves is caption 1's rank; image 0's best own caption falls behind too.
    assert evaluation._rank_changes(before, by_rounding, owners)["moved_beyond_rounding"] == 0
    assert evaluation._rank_changes(before, by_more, owners)["moved_beyond_rounding"] > 0


def test_other_data_than_the_bundles_is_refused(small_run, small_bundle, tmp_path):
    done = evaluated(small_run.folder, small_bundle, Path("scenes"), tmp_path / "out.json")
    assert "is not the one that" in str(done.exception) + done.output
    assert not (tmp_path / "out.json").exists()
