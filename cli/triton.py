"""`dualmatch triton`."""

from pathlib import Path

import click

from .common import existing, json_option, print_json, signature_option


@click.command("triton")
@click.argument("bundle", type=existing)
@click.option(
    "--out", required=True, type=existing, metavar="DIR", help="The model repository; other models in it stay."
)
@click.option("--name", default="dualmatch", show_default=True, help="What the models' names begin with.")
@click.option(
    "--engines",
    metavar="FLAVOUR",
    help="Serve the bundle's engines of this flavour (tensorrt) in place of its ONNX graphs.",
)
@click.option(
    "--max-batch", type=click.IntRange(1, 65536), default=64, show_default=True, help="Most items in a batch."
)
@click.option(
    "--queue-delay-us",
    type=click.IntRange(0, 10_000_000),
    default=1000,
    show_default=True,
    help="Microseconds that Triton waits for a batch to fill.",
)
@signature_option
@json_option
def command(
    bundle: Path, out: Path, name: str, engines: str | None, max_batch: int, queue_delay_us: int, *, as_json: bool
) -> None:
    """Write BUNDLE as a model repository for NVIDIA's Triton Inference Server.

    Four models: both encoders, the captions' tokenizer, and the ensemble that takes captions.
    """
    from dualmatch.export.triton import write_triton_repository
    from dualmatch.runtime.bundle import load_bundle

    models = write_triton_repository(
        load_bundle(bundle), out, name=name, engines=engines, max_batch=max_batch, queue_delay_us=queue_delay_us
    )
    if as_json:
        print_json({"repository": str(out), "models": models})
        return
    click.echo(f"{out}: {', '.join(models)}")
