"""`dualmatch export`."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import click

from .common import existing, gate_report_option, json_option, print_json, progress_reports, regions_option

if TYPE_CHECKING:
    from dualmatch.training.checkpoint import Run


@click.command("export")
@click.argument("run", type=existing)
@click.option("--out", required=True, type=existing, help="The bundle's folder.")
@click.option("--fp32", is_flag=True, help="Compute in float32 (the default).")
@click.option("--fp16", is_flag=True, help="Compute in float16, sums and normalisations in float32.")
@click.option(
    "--int8",
    is_flag=True,
    help="Compute on 8-bit integers, but for the layers that retrieval needs in float32.",
)
@click.option(
    "--calibration",
    metavar="DATA",
    help="With --int8: images and captions to find the ranges of the activations on, with the regions that come with them. [default: the gate's]",
)
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
@click.option(
    "--max-rsum-loss",
    type=click.FloatRange(0, 600),
    help="Points of Rsum that the 95 % bound of the loss may reach. [default: 0.5 at fp16, 3 at int8; fp32 goes by its components]",
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(-1, 1),
    help="Floor of the worst cosine to torch. [default: 0.999 at fp16, see docs/gate.md]",
)
@click.option(
    "--attention",
    is_flag=True,
    help="Let the image graph give its nodes too, for pictures of what the network looks at.",
)
@gate_report_option
@click.option(
    "--triton", type=existing, metavar="DIR", help="Write a Triton model repository too; see `dualmatch triton`."
)
@json_option
def command(
    run: Path,
    out: Path,
    calibration: str | None,
    data: str | None,
    regions: Path | None,
    vocab: Path | None,
    pad_policy: Literal["masked", "authors"] | None,
    fixed_length: int | None,
    triton: Path | None,
    max_rsum_loss: float | None,
    min_cosine: float | None,
    gate_report: Path | None,
    *,
    fp32: bool,
    fp16: bool,
    int8: bool,
    one_sentence: bool,
    unverified: bool,
    attention: bool,
    as_json: bool,
) -> None:
    """Export RUN's best epoch as a bundle: two ONNX graphs that left the gate with their recall.

    RUN is a training run's folder, or a checkpoint file (.pth.tar) of the DSRAN or VSRN authors with its --vocab.
    """
    precision = _precision(fp32=fp32, fp16=fp16, int8=int8)
    if calibration is not None and precision != "int8":
        raise click.UsageError("--calibration is for --int8; the other precisions have no ranges to find.")
    from dualmatch.export.bundle import export_run
    from dualmatch.export.gate import GateRefusedError, tolerances_for
    from dualmatch.export.triton import refuse_existing_models, write_triton_repository
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.runtime.gate_report import check_report_path, write_gate_report
    from dualmatch.training.evaluation import regions_of
    from dualmatch.training.padding import with_padding

    from .common import region_file
    from .verify import verification_lines

    if triton is not None:
        refuse_existing_models(triton, "dualmatch")
    if gate_report is not None:
        check_report_path(gate_report)
    title = f"dualmatch export {run.name} --{precision}"
    with TemporaryDirectory() as scratch, progress_reports() as progress:
        opened = _opened(run, vocab, Path(scratch), data, one_sentence=one_sentence)
        opened = with_padding(opened, pad_policy=pad_policy, fixed_length=fixed_length)
        data = data or opened.data
        dataset = open_dataset(data)
        try:
            result = export_run(
                opened,
                dataset,
                out,
                precision=precision,
                calibration=open_dataset(calibration) if calibration else None,
                regions=regions_of(opened, region_file(regions, dataset)),
                unverified=unverified,
                tolerances=tolerances_for(opened, precision, max_rsum_loss=max_rsum_loss, min_cosine=min_cosine),
                attention=attention,
                generated_data=data if data == "scenes" else None,
                progress=progress,
            )
        except GateRefusedError as refusal:
            if as_json:
                print_json(refusal.verification.to_json())
            else:
                click.echo(verification_lines(refusal.verification), err=True)
            if gate_report is not None:
                write_gate_report(refusal.verification, gate_report, title=f"{title}: refused")
            raise
    if gate_report is not None:
        write_gate_report(result.verification, gate_report, title=title)
    if triton is not None:
        write_triton_repository(result.bundle, triton)
    if as_json:
        print_json({"bundle": str(out), "hash": result.bundle.hash, **result.verification.to_json()})
        return
    click.echo(verification_lines(result.verification))
    click.echo(f"{out}: bundle written, {precision}")
    if triton is not None:
        click.echo(f"{triton}: Triton model repository written")


def _precision(*, fp32: bool, fp16: bool, int8: bool) -> Literal["fp32", "fp16", "int8"]:
    if fp32 + fp16 + int8 > 1:
        raise click.UsageError("--fp32, --fp16 and --int8 exclude each other: a bundle computes in one precision.")
    return "fp16" if fp16 else "int8" if int8 else "fp32"


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
