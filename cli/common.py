"""Options that mean the same everywhere, progress, and printing."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

existing = click.Path(path_type=Path)
data_option = click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="A data set's folder (LAYOUT:PATH where several layouts fit), or `scenes`.",
)
split_option = click.option(
    "--split", default="test", show_default=True, help="Splits joined into one set, separated by commas."
)
backend_option = click.option(
    "--backend",
    default="onnxruntime",
    show_default=True,
    help="onnxruntime, onnxruntime-cuda, onnxruntime-tensorrt, onnxruntime-tensorrt-rtx, openvino, tensorrt or tensorrt-rtx.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(0, 256), default=0, help="Threads of the backend; 0 leaves it to the backend."
)
batch_size_option = click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
regions_option = click.option(
    "--regions",
    type=existing,
    help="Precomputed regions, for networks that take them: an .npz, SCAN's *_ims.npy, or VLP's files (FEATURES[,BOXES.h5]).",
)
gate_report_option = click.option(
    "--gate-report",
    type=existing,
    metavar="FILE.html",
    help="Write what the gate found as one page, the flipped queries with thumbnails; also when it refuses.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _require_signature(ctx: click.Context, _: click.Parameter, key: Path | None) -> None:
    """Set the variable that `load_bundle` reads: it reaches every bundle that the command opens, in processes that it starts too."""
    if key is None:
        return
    from dualmatch.runtime.signature import VARIABLE

    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(key.absolute())
    ctx.call_on_close(
        lambda: os.environ.pop(VARIABLE, None) if before is None else os.environ.update({VARIABLE: before})
    )


signature_option = click.option(
    "--require-signature",
    type=existing,
    metavar="PUBLIC_KEY",
    callback=_require_signature,
    expose_value=False,
    help="Open no bundle that is not signed by this key.  [env: DUALMATCH_REQUIRE_SIGNATURE]",
)


def backend_options(command: F) -> F:
    """`--backend`, `--threads` and `--require-signature`: what every command that runs a bundle takes."""
    return backend_option(threads_option(signature_option(command)))


def print_json(values: Any) -> None:
    """JSON on standard output."""
    # A file name that is not UTF-8 cannot be printed; escaped like this it is still the JSON of that name.
    text = json.dumps(values, indent=2, ensure_ascii=False)
    click.echo(text.encode(errors="backslashreplace").decode())


def printable(text: str, *, keep: str = "") -> str:
    """`text` with control characters (but those in `keep`) escaped: a file's name must not move the cursor or forge a line."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def region_file(path: Path | None, dataset: Any = None) -> Any:
    """The opened region file: `path`, else the regions that come with the data set, else None."""
    path = path or (dataset.regions if dataset is not None else None)
    if path is None:
        return None
    from dualmatch.runtime.regions import RegionFile

    return RegionFile(path)


def splits(text: str) -> list[str]:
    """`val,test` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


@contextmanager
def progress_reports() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, of) that draws bars on a terminal and prints a line now and then elsewhere; `of` 0 is a message."""
    if not sys.stderr.isatty():
        yield _LineReports()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if total == 0:
                bars.console.print(what, highlight=False)
                return
            for other in [name for name in tasks if name != what]:
                bars.remove_task(tasks.pop(other))
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield report


class _LineReports:
    """At most a line every ten seconds for a piece of work, so that a log stays readable."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if total == 0:
            click.echo(what, err=True)
        elif time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            click.echo(f"{what}: {done} of {total}", err=True)


def recall_lines(recall: Any) -> str:
    """Recall both ways with its protocol, for people."""
    rows = []
    for name, metrics in (("image to text", recall.i2t), ("text to image", recall.t2i)):
        rows.append(
            f"{name}   R@1 {metrics.r1:5.1f}   R@5 {metrics.r5:5.1f}   R@10 {metrics.r10:5.1f}   "
            f"median rank {metrics.median:g}   mean rank {metrics.mean:.1f}"
        )
    return "\n".join([*rows, f"Rsum {recall.rsum:.1f}   ({recall.protocol})"])


def default_cache() -> Path:
    """Where features of frozen networks are kept between runs: $DUALMATCH_CACHE, or dualmatch in the user's cache folder."""
    if given := os.environ.get("DUALMATCH_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualmatch"
