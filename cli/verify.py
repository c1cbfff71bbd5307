"""`dualmatch runtime verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import (
    backend_options,
    batch_size_option,
    existing,
    gate_report_option,
    json_option,
    print_json,
    progress_reports,
    regions_option,
)

if TYPE_CHECKING:
    from dualmatch.runtime.verify import Verification

NUM_FLIPS, NUM_MAGNITUDES = 10, 3  # printed; the report and --json have all


@click.command("verify")
@click.argument("bundle", type=existing)
@click.option(
    "--data", metavar="DATA", help="Where the photographs are that the bundle was gated on; not needed for `scenes`."
)
@backend_options
@batch_size_option
@regions_option
@gate_report_option
@json_option
def command(
    bundle: Path,
    data: str | None,
    backend: str,
    threads: int,
    batch_size: int,
    regions: Path | None,
    gate_report: Path | None,
    *,
    as_json: bool,
) -> None:
    """Does BUNDLE retrieve here, on this backend, as it did in torch? Exit 0 only if it is shown to."""
    from dualmatch.runtime.bundle import load_bundle
    from dualmatch.runtime.datasets import open_dataset
    from dualmatch.runtime.errors import DualmatchError
    from dualmatch.runtime.gate_report import check_report_path, write_gate_report
    from dualmatch.runtime.reference import read_reference
    from dualmatch.runtime.verify import verify

    from .common import region_file

    if gate_report is not None:
        check_report_path(gate_report)
    opened = load_bundle(bundle)
    data = data or read_reference(opened).data
    dataset = open_dataset(data) if data else None
    with progress_reports() as progress:
        found = verify(
            opened,
            dataset,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            regions=region_file(regions, dataset),
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
    else:
        click.echo(verification_lines(found))
    if gate_report is not None:
        write_gate_report(
            found, gate_report, title=f"dualmatch verify {bundle.name} on {', '.join({*found.providers.values()})}"
        )
    if found.decision.verdict != "pass":
        raise DualmatchError(f"parity of {bundle} is not shown: {found.decision.reason}.")


def verification_lines(found: "Verification") -> str:
    """What the gate found, for people."""
    from dualmatch.runtime.stages import HALF_MAX, stage_lines

    lines = [*stage_lines(found.stages), ""]
    lines += [
        f"{name} encoder on {provider}: samples differ by at most {found.samples[name]:.1e}"
        for name, provider in found.providers.items()
        if name in found.samples
    ]
    lines += [
        f"largest {name} tensors in float16: "
        + ", ".join(f"{one.tensor} ({one.operator}) {one.largest:.4g}" for one in tensors[:NUM_MAGNITUDES])
        + f"; {100 * tensors[0].share:.1f} % of {HALF_MAX:.0f}"
        for name, tensors in found.magnitudes.items()
        if tensors
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
            f"Rsum lost {c.rsum_loss:.2f}, 95 % bound {c.bound:.2f}",
            f"cosine to torch, worst / 1 % / median: images {_triple(c.image_cosine)}, captions {_triple(c.caption_cosine)}",
            f"same first answer {c.same_first:.2f} %, first ten in common {c.overlap_at_10:.2f} %",
            f"hits lost {c.hits_lost}, won {c.hits_won}, net {c.hits_won - c.hits_lost:+d}",
        ]
        lines += [
            f"flipped {flip.direction}: rank {flip.rank_before} -> {flip.rank_after}, {flip.query}"
            for flip in found.flips[:NUM_FLIPS]
        ]
        if len(found.flips) > NUM_FLIPS:
            lines.append(f"and {len(found.flips) - NUM_FLIPS} more flipped queries: see --gate-report or --json")
    if smallest := found.decision.smallest:
        allowed = found.tolerances
        decides = (
            f"Rsum {smallest.rsum_loss:g} (tolerance {allowed.rsum_loss:g})"
            if allowed.component is None
            else f"component {smallest.component:g} (tolerance {allowed.component:g})"
        )
        lines.append(
            f"smallest tolerances that would have passed: {decides}, "
            f"cosine {smallest.worst_cosine:.6f} (floor {allowed.worst_cosine:g})"
        )
    lines.append(f"{found.decision.verdict.upper()}: {found.decision.reason}")
    return "\n".join(lines)


def _triple(values: tuple[float, float, float]) -> str:
    return " / ".join(f"{value:.6f}" for value in values)
