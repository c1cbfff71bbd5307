"""The harness against a bare loop around onnxruntime's `session.run`, on the same graph and inputs, taking turns (A B B A).

python -m dualmatch.bench.bare_loop BUNDLE --threads 1 --rounds 40
"""

import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from dualmatch.runtime.backends.onnxruntime import OnnxruntimeSession
from dualmatch.runtime.bundle import load_bundle

from .case import Case, case_feeds
from .compare import Ratio, ratio
from .latency import null_overhead
from .measure import Nanoseconds, Plan, run_window

CALLS = 15


def bare_block(session: Any, feeds: dict[str, Any]) -> Nanoseconds:
    """Latencies of `CALLS` calls of an `onnxruntime.InferenceSession`, with nothing of this package in between."""
    latencies = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        session.run(None, feeds)
        latencies.append(time.perf_counter_ns() - start)
    return np.array(latencies, dtype=np.int64)


def against_bare_loop(case: Case, rounds: int) -> tuple[Ratio, float, float, int]:
    """(bare loop's median over the harness's, both medians in ms, the null backend's median in ns)."""
    bundle = load_bundle(case.bundle)
    feeds = case_feeds(case, bundle)
    with OnnxruntimeSession(bundle.graph(case.encoder), threads=case.threads) as session:
        # One engine session for both: two would differ in where their weights happened to be put.
        engine = session._session  # noqa: SLF001
        blocks: dict[str, list[Nanoseconds]] = {"harness": [], "bare": []}
        for number in range(rounds + 2):
            if number == 2:  # two rounds of warm-up
                blocks = {"harness": [], "bare": []}
            for name in ("harness", "bare", "bare", "harness"):
                if name == "bare":
                    blocks[name].append(bare_block(engine, feeds))
                else:
                    plan = Plan(budget_s=1e-6, window_samples=CALLS)
                    blocks[name].append(run_window(lambda: session.run(feeds), plan))
        overhead = null_overhead(session, feeds)
    medians = {
        name: np.array([np.median(block) for block in own]).reshape(-1, 2).mean(1) for name, own in blocks.items()
    }
    overall = {name: float(np.median(np.concatenate(own))) / 1e6 for name, own in blocks.items()}
    return ratio(medians["harness"], medians["bare"]), overall["harness"], overall["bare"], overhead


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(0, 256), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(2), default=40, show_default=True)
def main(bundle: Path, threads: int, rounds: int) -> None:
    """How far the harness's median is from a bare loop's, for both encoders at batch 1."""
    for encoder in ("image", "text"):
        case = Case(bundle=bundle, encoder=encoder, threads=threads)
        found, harness, bare, overhead = against_bare_loop(case, rounds)
        click.echo(
            f"{encoder}: harness {harness:.4f} ms, bare loop {bare:.4f} ms, ratio of medians {harness / bare:.4f}; by rounds "
            f"{1 / found.value:.4f} ({1 / found.high:.4f} to {1 / found.low:.4f}); null backend {overhead / 1e3:.2f} us"
        )


if __name__ == "__main__":
    main()
