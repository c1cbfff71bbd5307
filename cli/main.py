"""`dualmatch`: the entry point and the table of commands."""

import re
import sys
from importlib import import_module
from pathlib import Path

import click

# name: (module, one line of help). The help stands here so that listing commands imports none of them.
Table = dict[str, tuple[str, str]]

RUNTIME: Table = {
    "encode-gallery": ("encode_gallery", "Encode photographs into a gallery that can be searched."),
    "encode-captions": ("encode_captions", "Encode captions into a gallery that can be searched."),
    "search": ("search", "Find the photographs or captions nearest to a text or a photograph."),
    "similarity": ("similarity", "Similarity matrix of an image gallery and a caption gallery."),
    "rerank": ("rerank", "Re-rank the best candidates of a similarity matrix."),
    "evaluate": ("evaluate", "Recall of a bundle on a data set."),
    "verify": ("verify", "Does a bundle retrieve here as it did in torch?"),
}
BENCH: Table = {
    "latency": ("bench_latency", "Latency of both encoders: load, first run and steady state apart."),
    "throughput": ("bench_throughput", "Items per second of both encoders, all work at hand at once."),
    "compare": ("bench_compare", "Backends and precisions against each other in one run: speed beside recall."),
    "recall": ("bench_recall", "Recall under every protocol, alone, together, re-ranked; where a model is weak."),
    "paper": ("bench_paper", "Our numbers beside those that the papers print, row by row."),
    "ablation": ("bench_ablation", "Train the rows of an ablation with several seeds, and compare them."),
    "sweep": ("bench_sweep", "Draw finished runs over one option of their recipes."),
    "training": ("bench_training", "Throughput of the training loop, and its wait for data."),
}
GALLERY: Table = {
    "check": ("gallery_check", "Verify every hash and count of a gallery."),
    "merge": ("gallery_merge", "Merge galleries, or the parts of one list, into a new gallery."),
    "append": ("gallery_append", "Add photographs, captions or another gallery to a gallery."),
    "remove": ("gallery_remove", "Remove items from a gallery by their ids."),
    "compact": ("gallery_compact", "Take removed items off the disk."),
    "export": ("gallery_export", "Write a gallery for another program: Parquet, NumPy, faiss, Qdrant."),
    "index": ("gallery_index", "Build an approximate index for `search --ann`, and measure its recall."),
}
DATA: Table = {
    "check": ("data_check", "Read all of a data set before a long run: counts, duplicates, faults, leakage."),
    "pool-regions": ("data_pool_regions", "Pool region features for given boxes into a region file."),
}
COMMANDS: Table = {
    "demo": ("demo", "The whole way on embedded data: train, export, encode, search, verify, bench."),
    "train": ("train", "Train a recipe on a data set."),
    "evaluate-checkpoint": (
        "evaluate_checkpoint",
        "Recall of a trained run in torch, the reference for everything else.",
    ),
    "export": ("export", "Export a trained run as a bundle of two ONNX graphs, if recall survives."),
    "compile": ("compile", "Compile a bundle's graphs to TensorRT engines."),
    "report": ("report", "One HTML page on a folder's runs, bundles and benchmarks, with pictures."),
    "sign": ("sign", "Sign a bundle, so that whoever opens it can require your signature."),
    "triton": ("triton", "Write a bundle as a model repository for NVIDIA's Triton server."),
}


class LazyGroup(click.Group):
    """A group whose commands live in modules of this folder and are imported when they are called."""

    def __init__(self, name: str, table: Table, **attributes: str) -> None:
        super().__init__(name, help=attributes.get("help"), no_args_is_help=True)
        self.table = table
        self.context_settings = {"help_option_names": ["-h", "--help"]}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.table, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return super().get_command(ctx, cmd_name)
        command = import_module(f"dualmatch.cli.{self.table[cmd_name][0]}").command
        assert isinstance(command, click.Command)
        command.context_settings.setdefault("help_option_names", ["-h", "--help"])
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  (click's signature)
        rows = [(name, line) for name, (_, line) in self.table.items()]
        rows += [(name, command.get_short_help_str(limit=80)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


cli = LazyGroup(
    "dualmatch",
    COMMANDS,
    help="Image-text retrieval networks from paper to production, with proof that recall survived.",
)
cli.add_command(
    LazyGroup("runtime", RUNTIME, help="Serve a bundle: encode, search, rank, evaluate, verify. Needs no torch.")
)
cli.add_command(LazyGroup("bench", BENCH, help="Measure."))
cli.add_command(LazyGroup("gallery", GALLERY, help="Look after galleries."))
cli.add_command(LazyGroup("data", DATA, help="Look after data sets."))
cli = click.version_option(package_name="dualmatch")(cli)

_EXTRA_OF = {
    "torch": "train", "transformers": "train", "safetensors": "train", "onnx": "export", "onnxscript": "export",
    "onnxruntime": "cpu", "psutil": "bench", "tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt",
    "cryptography": "sign", "openvino": "openvino", "tensorboard": "train",
}  # fmt: skip


def main() -> None:
    """Run the command line: exit 0 on success, 2 on wrong usage, 1 with one sentence on anything else that a user can cause."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped.", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        _fail(sentence, 1)


def _sentence(error: Exception) -> str | None:
    """What to tell a user about an error that a user can cause; None for a fault of the program."""
    # Imported here because it brings NumPy along, which `--help` does without.
    from dualmatch.runtime.errors import DualmatchError

    if isinstance(error, DualmatchError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in _EXTRA_OF:
            return (
                f"this command needs {package}, which is not installed: pip install 'dualmatch[{_EXTRA_OF[package]}]'."
            )
    if isinstance(error, OSError) and error.strerror is not None:
        # A file is written under a temporary name beside its own; people know it by its own.
        name = re.sub(r"\.([^/]+)\.[a-z0-9_]{8}\.part$", r"\1", str(error.filename or "the output"))
        if isinstance(error, FileExistsError) and Path(name).is_file():
            return f"{name} is a file, so nothing can be written below it; give a path elsewhere."
        return f"{name} cannot be read or written: {error.strerror}."
    return None


def _fail(message: str, code: int) -> None:
    from .common import printable

    # Messages quote file names, whose control characters must not reach the terminal; our own may have several lines.
    click.echo(f"dualmatch: {printable(message, keep=chr(10))}", err=True)
    sys.exit(code)
