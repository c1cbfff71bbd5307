"""`dualmatch runtime verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import (
    backend_options,
    batch_size_option,
    existing,
    json_option,
    print_json,
    progress_reports,
    regions_option,
)

if TYPE_CHECKING:
    from dualmatch.runtime.verify import Verification


@click.command("verify")
@click.argument("bundle", type=existing)
@click.option(
    "--data", metavar="DATA", help="Where the photographs are that the bundle was gated on; not needed for `scenes`."
)
@backend_options
@batch_size_option
@regions_option
@json_option
def command(
    bundle: Path, data: str | None, backend: str, threads: int, batch_size: int, regions: Path | None, *, as_json: bool
) -> None:
    """Does BUNDLE retrieve here, on this backend, as it did in torch? Exit 0 only if it is shown to."""
    from dualmatch.runtime.bundle import load_bundle
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.runtime.errors import DualmatchError
    from dualmatch.runtime.reference import read_reference
    from dualmatch.runtime.verify import verify

    from .common import region_file

    opened = load_bundle(bundle)
    data = data or read_reference(opened.path).data
    with progress_reports() as progress:
        found = verify(
            opened,
            open_dataset(data) if data else None,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            regions=region_file(regions),
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
    else:
        click.echo(verification_lines(found))
    if found.decision.verdict != "pass":
        raise DualmatchError(f"parity of {bundle} is not shown: {found.decision.reason}.")


def verification_lines(found: "Verification") -> str:
    """What was compared, for people."""
    lines = [
        f"{name} encoder on {provider}: samples differ by at most {found.samples[name]:.1e}"
        for name, provider in found.providers.items()
    ]
    if found.comparison is not None:
        c = found.comparison
        for label, recall in (("torch ", c.before), ("bundle", c.after)):
            i2t, t2i = recall.i2t, recall.t2i
            lines.append(
                f"{label}   i2t R@1 {i2t.r1:.1f} R@5 {i2t.r5:.1f} R@10 {i2t.r10:.1f}   "
                f"t2i R@1 {t2i.r1:.1f} R@5 {t2i.r5:.1f} R@10 {t2i.r10:.1f}   Rsum {recall.rsum:.2f}"
            )
        lines += [
            f"protocol: {c.before.protocol}",
            f"cosine to torch, worst / 1 % / median: images {_triple(c.image_cosine)}, captions {_triple(c.caption_cosine)}",
            f"same first answer {c.same_first:.2f} %, first ten in common {c.overlap_at_10:.2f} %, hits lost {c.hits_lost}, won {c.hits_won}",
        ]
        lines += [
            f"flipped: {f.direction} query {f.query}, rank {f.rank_before + 1} -> {f.rank_after + 1}"
            for f in c.flips[:5]
        ]
    lines.append(f"{found.decision.verdict.upper()}: {found.decision.reason}")
    return "\n".join(lines)


def _triple(values: tuple[float, float, float]) -> str:
    return " / ".join(f"{value:.6f}" for value in values)
