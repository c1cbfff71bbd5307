"""A bundle's graphs compiled to TensorRT engines inside the bundle. Needs neither torch nor transformers."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dualmatch.runtime.bundle import file_entry, load_bundle, write_manifest
from dualmatch.runtime.errors import DualmatchError

from .engine import EngineRecord, build_engine
from .engine_profiles import AxisRange, Profile, parse_axis_range, profile_from_text


def compile_bundle(
    path: Path,
    *,
    flavour: str,
    profiles: Sequence[str],
    length: str | None = None,
    workspace_bytes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[EngineRecord]:
    """Compile both encoders; engines of the same flavour from before are replaced, and only when both new ones are complete.

    Args:
        profiles: `latency`, `throughput` or `MIN:OPT:MAX` batch sizes; one engine holds them all.
        length: `MIN:OPT:MAX` caption lengths in tokens.

    Raises:
        DualmatchError: no bundle, the flavour's package is missing, or the graph does not build.
    """
    bundle = load_bundle(path)
    limits = bundle.manifest.tokenizer
    longest = limits.fixed_length or limits.max_length or 64
    lengths = (
        parse_axis_range(length, what="--length")
        if length
        else AxisRange(limits.fixed_length or 1, min(16, longest), longest)
    )
    if limits.fixed_length:
        lengths = AxisRange(longest, longest, longest)
    elif lengths.max > longest:
        raise DualmatchError(f"--length reaches {lengths.max} tokens, but the bundle cuts captions at {longest}.")
    with tempfile.TemporaryDirectory(dir=path, prefix=".engines-") as building:
        records = []
        for name, entry in bundle.manifest.encoders.items():
            chosen: list[Profile] = [
                profile_from_text(text, entry.inputs, length=lengths if name == "text" else None) for text in profiles
            ]
            record = build_engine(
                bundle.path / entry.file,
                Path(building) / f"{name}_encoder.{flavour}.engine",
                flavour=flavour,
                inputs=entry.inputs,
                profiles=chosen,
                workspace_bytes=workspace_bytes,
                progress=_named(progress, name),
            )
            records.append(replace(record, file=f"engines/{record.file}"))
        # Unlisted before they are replaced: a kill in between costs the engines, not the bundle.
        kept = tuple(engine for engine in bundle.manifest.engines if engine["flavour"] != flavour)
        listed = {str(engine["file"]) for engine in bundle.manifest.engines} - {str(engine["file"]) for engine in kept}
        files = {name: entry for name, entry in bundle.manifest.files.items() if name not in listed}
        write_manifest(path, replace(bundle.manifest, engines=kept, files=files))
        (path / "engines").mkdir(exist_ok=True)
        for record in records:
            (Path(building) / Path(record.file).name).replace(path / record.file)
    files |= {record.file: file_entry(path / record.file) for record in records}
    engines = (*kept, *(record.to_json() for record in records))
    write_manifest(path, replace(bundle.manifest, engines=engines, files=files))
    return records


def _named(progress: Callable[[str, int, int], None] | None, encoder: str) -> Callable[[str, int, int], None] | None:
    """Reports that say which encoder they are about."""
    if progress is None:
        return None
    return lambda phase, done, of: progress(f"{encoder} encoder: {phase}", done, of)
