"""What the two encoding commands share: which rows, how shards are cut, stopping between batches, and the report."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from .common import print_json, printable

F = TypeVar("F", bound=Callable[..., Any])


def _row_range(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, int | None] | None:
    """`A:B`, `A:` or `:B`: source rows counted from 0, B not included."""
    if value is None:
        return None
    first, colon, end = value.partition(":")
    if not colon or not all(part == "" or (part.isascii() and part.isdigit()) for part in (first, end)):
        raise click.BadParameter(f"{value!r} is not A:B with whole numbers.")
    return int(first or 0), int(end) if end else None


class GalleryPlace(click.Path):
    """A path; as text where it is a URL for `--engine ray`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from dualmatch.runtime.galleries.urls import is_url, local_path

        return str(value) if is_url(value) else super().convert(local_path(value), param, ctx)


def local_folder(out: Path | str) -> Path:
    """`out`, refused where it is a URL."""
    if isinstance(out, str):
        raise click.BadParameter(
            f"{out} is no folder; `encode-gallery --engine ray` writes to object stores.", param_hint="--out"
        )
    return out


def encoding_options(command: F) -> F:
    """`--out`, `--dtype`, `--rows`, `--rows-per-shard`, `--prepare-threads`, `--resume` and `--on-error`."""
    options = (
        click.option("--out", required=True, type=GalleryPlace(), help="The gallery's folder."),
        click.option(
            "--dtype",
            type=click.Choice(["float16", "float32"]),
            default="float16",
            show_default=True,
            help="Of the stored vectors.",
        ),
        click.option(
            "--rows",
            metavar="A:B",
            callback=_row_range,
            help="Encode these rows of the source only, counted from 0, between two shards; `gallery merge` joins the parts.",
        ),
        click.option(
            "--rows-per-shard", type=click.IntRange(1), help="A multiple of the batch size.  [default: about 4096]"
        ),
        click.option(
            "--prepare-threads",
            type=click.IntRange(1, 256),
            help="Threads that read and pre-process.  [default: one per core, at most 16]",
        ),
        click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped."),
        click.option(
            "--on-error",
            type=click.Choice(["quarantine", "fail"]),
            default="quarantine",
            show_default=True,
            help="What an unreadable photograph or an unusable caption does.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


class _StopError(Exception):
    pass


@contextmanager
def stoppable(out: Path | str) -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM end a run after the batch in hand, a second one at once; gives what to call after every batch.

    Raises:
        SystemExit: with 128 and the signal's number, after saying what is kept and how to go on.
    """
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        os.write(2, b"stopping after the batch in hand\n")  # click.echo may be what was interrupted

    def check() -> None:
        if received:
            raise _StopError

    mine = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)} if mine else {}
    try:
        yield check
    except (_StopError, KeyboardInterrupt):
        number = received[0] if received else signal.SIGINT
        click.echo(f"dualmatch: stopped by {signal.Signals(number).name}: {_kept(out)}.", err=True)
        sys.exit(128 + number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kept(out: Path | str) -> str:
    from dualmatch.runtime.errors import DualmatchError
    from dualmatch.runtime.galleries import journal
    from dualmatch.runtime.ray_records import rows_kept

    try:
        done, total = rows_kept(out) or journal.rows_kept(local_folder(out))
    except (DualmatchError, click.BadParameter):
        return "nothing was finished, and nothing is kept"
    return f"{done} of {total} rows are kept in {out}; go on with the same command and --resume"


def report_gallery(out: Path | str, summary: object, provider: str, *, as_json: bool) -> None:
    """Print what was encoded, and the first sources that could not be."""
    from dualmatch.runtime.galleries.writer import Summary
    from dualmatch.runtime.ray_records import finished_gallery

    assert isinstance(summary, Summary)
    quarantine, dimension = finished_gallery(out)
    if as_json:
        print_json(
            {
                "gallery": str(out),
                "rows": summary.rows,
                "count": summary.count,
                "resumed_rows": summary.resumed_rows,
                "quarantined": [{"id": one.id, "reason": one.reason} for one in quarantine],
                "provider": provider,
            }
        )
        return
    for one in quarantine[:10]:
        click.echo(printable(f"quarantined: {one.id}: {one.reason}"))
    if len(quarantine) > 10:
        click.echo(f"… and {len(quarantine) - 10} more in {out}/quarantine.jsonl")
    resumed = f" ({summary.resumed_rows} of the rows by an earlier run)" if summary.resumed_rows else ""
    click.echo(
        f"{out}: {summary.count} of {summary.rows} encoded on {provider}{resumed}, "
        f"{summary.quarantined} quarantined, dimension {dimension}"
    )
