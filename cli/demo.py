"""`dualmatch demo`: every other command's work in a row, on the embedded scenes, through the same functions."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import existing, progress_reports

if TYPE_CHECKING:
    from dualmatch.runtime.bundle import Bundle
    from dualmatch.runtime.datasets import Dataset

Progress = Callable[[str, int, int], None]
COMPILE_FLAVOUR = "tensorrt-rtx"


@click.command("demo")
@click.option(
    "--out",
    type=existing,
    default=Path("demo"),
    show_default=True,
    help="Folder for run, bundle, photos, gallery and picture sheet.",
)
@click.option("--recipe", default="scenes-dsran-gru", show_default=True, help="A recipe for the embedded scenes.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change an option of the recipe, for example train.epochs=3.",
)
def command(out: Path, recipe: str, overrides: tuple[str, ...]) -> None:
    """Train on drawn scenes, export at fp16, compile, encode a gallery, search it by relation, verify, bench, report: the whole way.

    Rerunnable: a finished run of the same recipe in --out is used again, an interrupted one is continued.
    """
    from rich.console import Console

    steps = _Steps()
    with progress_reports() as progress:
        latency = _whole_way(out, recipe, overrides, steps, progress)
    console = Console()
    console.print(latency)
    console.print(steps.table())


class _Steps:
    """What was done, what came of it, and how long it took."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, float]] = []
        self.result = ""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step; its body sets `result`."""
        click.echo(f"{name} …", err=True)
        started = time.perf_counter()
        yield
        self.rows.append((name, self.result, time.perf_counter() - started))

    def table(self) -> Any:
        """The closing table."""
        from rich.table import Table

        table = Table(title="dualmatch demo")
        table.add_column("step")
        table.add_column("result", overflow="fold")
        table.add_column("seconds", justify="right")
        for name, result, seconds in self.rows:
            table.add_row(name, result, f"{seconds:.1f}")
        table.add_section()
        table.add_row("in all", "", f"{sum(seconds for *_, seconds in self.rows):.1f}")
        return table


def _whole_way(out: Path, recipe: str, overrides: tuple[str, ...], steps: _Steps, progress: Progress) -> Any:
    from dualmatch.bench.bundle_latency import bench_latency
    from dualmatch.bench.bundle_recall import encoded_bundles, recall_report
    from dualmatch.bench.html.report import write_report
    from dualmatch.bench.measure import Plan
    from dualmatch.runtime.bundle import load_bundle
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.runtime.encode import encode_gallery
    from dualmatch.runtime.errors import DualmatchError
    from dualmatch.runtime.verify import verify
    from dualmatch.training.evaluation import evaluate_run

    scenes = open_dataset("scenes")
    test = scenes.select(["test"])
    with steps.step("train"):
        steps.result = _train(out / "run", recipe, overrides, scenes, progress)
    with steps.step("evaluate in torch"):
        torch_recall = evaluate_run(out / "run", test, progress=progress)
        steps.result = f"Rsum {torch_recall.rsum:.1f} on {torch_recall.protocol.images} test scenes"
    with steps.step("export --fp16"):
        steps.result = _export(out, scenes, progress)
    with steps.step(f"compile --flavour {COMPILE_FLAVOUR}"):
        steps.result = _compile(out / "bundle", progress)
    bundle = load_bundle(out / "bundle")
    with steps.step("encode-gallery"):
        _write_photos(out / "photos", test)
        shutil.rmtree(out / "gallery", ignore_errors=True)
        summary, provider = encode_gallery(bundle, out / "photos" / "images", out / "gallery", progress=None)
        steps.result = f"{summary.count} photographs on {provider}"
    with steps.step("search"):
        steps.result = _search(out, bundle, test)
    with steps.step("evaluate the bundle"):
        report = recall_report(encoded_bundles([bundle], test), test)
        report.write(out / "recall.json")
        recall = report.rows[0].recall
        relation, setting = (
            next(pair["captions"]["value"] for pair in report.pairs if pair["differs"] == what)
            for what in ("relation", "setting")
        )
        steps.result = (
            f"Rsum {recall.rsum:.1f} ({recall.rsum - torch_recall.rsum:+.2f} to torch); hard pairs told apart: "
            f"by relation {relation:.0f} %, by setting {setting:.0f} % (chance: 50 %)"
        )
    with steps.step("verify"):
        found = verify(bundle, scenes, progress=progress)
        steps.result = f"{found.decision.verdict}: {found.decision.reason}"
        if found.decision.verdict != "pass":
            raise DualmatchError(f"the demo's bundle does not retrieve as torch does: {found.decision.reason}.")
    with steps.step("bench latency"):
        latency = bench_latency(out / "bundle", batches=(1, 32), plan=Plan(budget_s=2.0))
        latency.write(out / "latency.json", samples=out / "latency-samples.jsonl")
        steps.result = f"{out / 'latency.json'}, table above"
    with steps.step("report"):
        steps.result = f"{write_report(out, dataset=test).path}: open it in a browser"
    return latency.table()


def _train(run: Path, recipe: str, overrides: tuple[str, ...], scenes: "Dataset", progress: Progress) -> str:
    from dualmatch.training.checkpoint import read_facts
    from dualmatch.training.loop import train
    from dualmatch.training.recipe import load_recipe
    from dualmatch.training.resume import is_finished

    chosen = load_recipe(recipe, overrides)
    if is_finished(chosen, scenes, run):
        facts = read_facts(run / "last.safetensors")
        return f"{run} was trained before: epoch {facts['best_epoch']}, validation Rsum {facts['best_rsum']:.1f}"
    resume = (run / "last.safetensors").is_file()
    best = train(chosen, scenes, run, data_name="scenes", cache=run.parent / "cache", resume=resume, progress=progress)
    return f"best epoch {best['epoch']} of {chosen.train.epochs}, validation Rsum {best['val_rsum']:.1f}"


def _export(out: Path, scenes: "Dataset", progress: Progress) -> str:
    from dualmatch.export.bundle import export_run
    from dualmatch.training.checkpoint import load_run

    shutil.rmtree(out / "bundle", ignore_errors=True)
    result = export_run(
        load_run(out / "run"), scenes, out / "bundle", precision="fp16", generated_data="scenes", progress=progress
    )
    return f"gate {result.verification.decision.verdict}: {result.verification.decision.reason}"


def _compile(bundle: Path, progress: Progress) -> str:
    from importlib.util import find_spec

    from dualmatch.export.compile import compile_bundle

    if find_spec("tensorrt_rtx") is None:
        return "not run: tensorrt-rtx is not installed (pip install 'dualmatch[tensorrt-rtx]')"
    records = compile_bundle(bundle, flavour=COMPILE_FLAVOUR, profiles=("latency", "throughput"), progress=progress)
    sizes = ", ".join(
        f"{Path(record.file).name.partition('_')[0]} {record.bytes / 2**20:.1f} MiB" for record in records
    )
    return f"engines built, not run: running them takes a GPU ({sizes})"


def _write_photos(folder: Path, test: "Dataset") -> None:
    """The test scenes as a user's folder would be: images/ and captions.json."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for item in test.items:
        name = f"{item.id}.png"
        (folder / "images" / name).write_bytes(item.read_bytes())
        entries.append({"filename": name, "split": item.split, "captions": list(item.captions)})
    (folder / "captions.json").write_text(
        json.dumps({"dataset": "scenes", "images": entries}, indent=1), encoding="utf-8"
    )


def _search(out: Path, bundle: "Bundle", test: "Dataset") -> str:
    """Both captions of the first pair that differs in its relation, and of the first that differs in its setting, on one sheet."""
    from dataclasses import replace

    from dualmatch.runtime.galleries.gallery import Gallery
    from dualmatch.runtime.search import search
    from dualmatch.runtime.sheet import Search, search_sheet

    gallery = Gallery.open(out / "gallery")
    by_id = {item.id: item for item in test.items}
    searches, first_right = [], 0
    for what in ("relation", "setting"):
        first = next(item for item in test.items if dict(item.tags)["differs"] == what)
        for item in (first, by_id[dict(first.tags)["pair"]]):
            hits = search(gallery, bundle, text=item.captions[0], k=5)
            marked = [replace(hit, right=hit.id == f"{item.id}.png") for hit in hits]
            first_right += marked[0].right
            searches.append(Search(query=item.captions[0], hits=marked))
    note = "Queries one and two differ only in the relation, three and four only in the setting. The scene that the query describes is marked."
    for suffix in (".html", ".png"):
        search_sheet(searches, out / f"search{suffix}", title="dualmatch demo", note=note)
    return f'"{searches[0].query}": {out / "search.html"} and .png; right scene first in {first_right} of {len(searches)} searches'
