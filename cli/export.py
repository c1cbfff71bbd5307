"""`dualmatch export`."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import click

from .common import existing, json_option, print_json, progress_reports, regions_option

if TYPE_CHECKING:
    from dualmatch.training.checkpoint import Run


@click.command("export")
@click.argument("run", type=existing)
@click.option("--out", required=True, type=existing, help="The bundle's folder.")
@click.option("--fp32", "precision", flag_value="fp32", default=True, help="Compute in float32 (the default).")
@click.option("--fp16", "precision", flag_value="fp16", help="Compute in float16, sums and normalisations in float32.")
@click.option(
    "--data", metavar="DATA", help="Pairs for the gate. [default: the data that RUN was trained on, all splits]"
)
@regions_option
@click.option(
    "--vocab",
    type=existing,
    help="For an authors' checkpoint: the vocabulary pickle that belongs to it; for DSRAN-BERT its BERT's vocab.txt.",
)
@click.option(
    "--one-sentence",
    is_flag=True,
    help="With --vocab: take every caption for one sentence, where NLTK's Punkt data is not at hand.",
)
@click.option(
    "--pad-policy",
    type=click.Choice(["masked", "authors"]),
    help="Serve captions with other padding than in training; the gate measures what that costs.",
)
@click.option(
    "--fixed-length", type=click.IntRange(1), help="Cut and pad captions to so many tokens; measured likewise."
)
@click.option(
    "--unverified",
    is_flag=True,
    help="Write the bundle although the pairs are too few to tell; the manifest records it.",
)
@json_option
def command(
    run: Path,
    out: Path,
    precision: Literal["fp32", "fp16"],
    data: str | None,
    regions: Path | None,
    vocab: Path | None,
    pad_policy: Literal["masked", "authors"] | None,
    fixed_length: int | None,
    *,
    one_sentence: bool,
    unverified: bool,
    as_json: bool,
) -> None:
    """Export RUN's best epoch as a bundle: two ONNX graphs that left the gate with their recall.

    RUN is a training run's folder, or a checkpoint file (.pth.tar) of the DSRAN or VSRN authors with its --vocab.
    """
    from dualmatch.export.bundle import GateRefusedError, export_run
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.training.evaluation import regions_of
    from dualmatch.training.padding import with_padding

    from .common import region_file
    from .verify import verification_lines

    with TemporaryDirectory() as scratch, progress_reports() as progress:
        opened = _opened(run, vocab, Path(scratch), data, one_sentence=one_sentence)
        opened = with_padding(opened, pad_policy=pad_policy, fixed_length=fixed_length)
        data = data or opened.data
        try:
            result = export_run(
                opened,
                open_dataset(data),
                out,
                precision=precision,
                regions=regions_of(opened, region_file(regions)),
                unverified=unverified,
                generated_data=data if data == "scenes" else None,
                progress=progress,
            )
        except GateRefusedError as refusal:
            click.echo(verification_lines(refusal.verification), err=True)
            raise
    if as_json:
        print_json({"bundle": str(out), "hash": result.bundle.hash, **result.verification.to_json()})
        return
    click.echo(verification_lines(result.verification))
    for name, found in result.magnitudes.items():
        if found:
            top = found[0]
            click.echo(
                f"largest {name} tensor in float16: {top.largest:.3g} ({top.operator}), {100 * top.share:.1f} % of the range"
            )
    click.echo(f"{out}: bundle written, {precision}")


def _opened(run: Path, vocab: Path | None, scratch: Path, data: str | None, *, one_sentence: bool) -> "Run":
    from dualmatch.runtime.errors import DualmatchError
    from dualmatch.training.authors_run import run_from_authors
    from dualmatch.training.checkpoint import load_run

    if not run.is_file():
        if vocab is not None or one_sentence:
            raise DualmatchError(
                f"--vocab and --one-sentence are for a checkpoint file of the authors; {run} is none, and a run has its own tokenizer."
            )
        return load_run(run)
    if vocab is None:
        raise DualmatchError(f"{run} is a file: a checkpoint of the authors needs its vocabulary, --vocab FILE.")
    if data is None:
        raise DualmatchError(f"the checkpoint {run} names no data: give the pairs for the gate with --data DATA.")
    return run_from_authors(run, vocab, scratch, one_sentence=one_sentence)
