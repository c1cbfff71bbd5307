"""`bench training`: figures of the loop's own log, without its first epoch, and a word where data holds it up."""

import json

import pytest
from rich.console import Console

from dualmatch.bench import training
from dualmatch.bench.training import TrainingCase, bench_training, training_table

from .demo_fixture import dualmatch
from .tiny_runs import SIZES

TINY = [part for one in (*SIZES, 'data.train_splits=["val"]', 'data.val_splits=["test"]') for part in ("--set", one)]


def printed(cases):
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(training_table(cases))
    return capture.get()


def test_the_figures_are_the_logs_without_the_first_epoch(monkeypatch, tmp_path):
    lines = [
        {"pairs_per_second": rate, "data_wait": wait} for rate, wait in ((1, 0.9), (30, 0.2), (10, 0.05), (20, 0.01))
    ]
    asked = []

    class Done:
        returncode, stderr = 0, ""

    def run(command, **_):
        asked.append(command)
        out = command[command.index("--out") + 1]
        (tmp_path / out).mkdir(parents=True)
        (tmp_path / out / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return Done()

    monkeypatch.setattr(training.subprocess, "run", run)
    (case,) = bench_training("any", "scenes", workers=[3], epochs=4)
    assert case == TrainingCase(workers=3, pairs_per_second=20, data_wait=0.05)
    assert asked[0][asked[0].index("--workers") + 1] == "3"
    assert "--set=train.epochs=4" in asked[0]


def test_a_loop_that_waits_is_said_to_be_held_up():
    cases = [
        TrainingCase(workers=0, pairs_per_second=100, data_wait=0.31),
        TrainingCase(workers=2, pairs_per_second=150, data_wait=0.099),
    ]
    first, second = (line for line in printed(cases).splitlines() if "pairs" not in line and " x " in line)
    assert "31.0% (held up)" in first
    assert "1.50 x" in second
    assert "held up" not in second


def test_the_command_trains_and_reports(tmp_path):
    arguments = ("scenes-dsran-gru", "--data", "scenes", *TINY, "--cache", tmp_path)
    done = dualmatch(
        "bench", "training", *arguments, "--workers", "0,1", "--epochs", "2", "--json", "--out", tmp_path / "f"
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report == json.loads((tmp_path / "f").read_text())
    assert [case["workers"] for case in report["cases"]] == [0, 1]
    for case in report["cases"]:
        assert case["pairs_per_second"] > 0
        assert 0 <= case["data_wait"] <= 1


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--workers", "-1"), 2, "--workers takes numbers from 0 to 256"),
        (("--workers", "two"), 2, "--workers takes numbers from 0 to 256"),
        (("--epochs", "1"), 2, "x>=2"),
        (("--workers", "0", "--set", "train.lern=1"), 1, "training with 0 workers failed: "),
    ],
)
def test_wrong_input_is_a_sentence(arguments, code, sentence):
    done = dualmatch("bench", "training", "scenes-dsran-gru", "--data", "scenes", *arguments)
    assert (done.code, sentence in done.err) == (code, True)
