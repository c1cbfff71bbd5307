"""Each encoder of a bundle on several backends in one run, with the ratio to the first of them.

python -m dualmatch.bench.backends BUNDLE --backends onnxruntime,openvino --threads 2 --batch-sizes 1,32 --out FILE
"""

import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from dualmatch.runtime.backends import open_session
from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.files import write_atomically
from dualmatch.runtime.tokenizer import CaptionTokenizer

from .environment import environment
from .latency import CaseResult, LatencyReport, measure_case, random_feeds
from .measure import Plan


def compare_backends(
    path: Path,
    *,
    backends: Sequence[str],
    threads: int,
    batches: Sequence[int],
    length: int,
    plan: Plan,
    encoders: Sequence[str] = ("image", "text"),
) -> LatencyReport:
    """Measure every encoder and batch size on every backend, the backends of a case one after the other."""
    bundle = load_bundle(path)
    vocabulary_size = CaptionTokenizer(bundle.read("tokenizer.json"), bundle.manifest.tokenizer).vocabulary_size
    length = bundle.manifest.tokenizer.fixed_length or length
    cases: list[CaseResult] = []
    for encoder, entry in bundle.manifest.encoders.items():
        if encoder not in encoders:
            continue
        graph = bundle.graph(encoder)
        for batch in batches:
            feeds = random_feeds(entry.inputs, batch=batch, length=length, vocabulary_size=vocabulary_size)
            cases += [
                measure_case(
                    lambda backend=backend, graph=graph: open_session(graph, backend=backend, threads=threads),  # type: ignore[misc]
                    lambda _, feeds=feeds: feeds,  # type: ignore[misc]
                    encoder=encoder,
                    batch=batch,
                    plan=plan,
                )
                for backend in backends
            ]
    subject = {
        "bundle_hash": bundle.hash,
        "recipe": bundle.manifest.model["recipe"],
        "precision": {name: entry.precision for name, entry in bundle.manifest.encoders.items()},
        "backends": list(backends),
        "threads": threads,
        "caption_length": length,
    }
    return LatencyReport(environment=environment(), cases=cases, plan=plan, subject=subject)


def ratio_lines(cases: Sequence[CaseResult]) -> list[str]:
    """A line a case: median, and how many times as fast as the first backend at the same encoder and batch size."""
    first: dict[tuple[str, int], float] = {}
    lines = []
    for case in cases:
        median = float(np.median(case.measurement.samples.raw))
        reference = first.setdefault((case.encoder, case.batch), median)
        lines.append(
            f"{case.encoder:5s}  batch {case.batch:3d}  {case.backend:16s} {median / 1e6:9.2f} ms  {reference / median:5.2f}x"
            f"  ({case.provider}{'' if case.measurement.stable else '; unstable'})"
        )
    return lines


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backends", default="onnxruntime,openvino", show_default=True)
@click.option("--encoders", default="image,text", show_default=True)
@click.option("--threads", type=click.IntRange(0, 256), default=2, show_default=True)
@click.option("--batch-sizes", default="1,32", show_default=True)
@click.option("--length", type=click.IntRange(1, 4096), default=16, show_default=True)
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the report as JSON.")
def main(
    bundle: Path,
    backends: str,
    encoders: str,
    threads: int,
    batch_sizes: str,
    *,
    length: int,
    budget: float,
    out: Path | None,
) -> None:
    """Latency of BUNDLE's encoders on several backends, as ratios to the first."""
    report = compare_backends(
        bundle,
        backends=backends.split(","),
        threads=threads,
        batches=[int(part) for part in batch_sizes.split(",")],
        length=length,
        plan=Plan(budget_s=budget),
        encoders=encoders.split(","),
    )
    click.echo("\n".join(ratio_lines(report.cases)))
    if out is not None:
        write_atomically(out, json.dumps(report.to_json(), indent=2) + "\n")


if __name__ == "__main__":
    main()
