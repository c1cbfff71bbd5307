"""A bundle's graphs compiled to TensorRT engines inside the bundle. Needs neither torch nor transformers."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dualmatch.runtime.backends.engine_record import EngineRecord, HardwareCompatibility, engine_file
from dualmatch.runtime.bundle import Bundle, file_entry, load_bundle, write_manifest
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import write_atomically

from .engine import build_engine
from .engine_profiles import AxisRange, parse_axis_range, profile_from_text
from .reproduce import reproduce_script

Progress = Callable[[str, int, int], None]
DEFAULT_LENGTH = 64  # tokens, where the tokenizer cuts no caption and no --length is given


def compile_bundle(
    path: Path,
    *,
    flavour: str,
    profiles: Sequence[str],
    length: str | None = None,
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    hardware_compatibility: HardwareCompatibility = "none",
    progress: Progress | None = None,
) -> list[EngineRecord]:
    """Compile both encoders; engines of the same flavour from before are replaced, and only when both new ones are complete.

    Beside each engine lies a script that builds it again without dualmatch.

    Args:
        profiles: `latency`, `throughput` or `MIN:OPT:MAX` batch sizes; one engine holds them all.
        length: `MIN:OPT:MAX` caption lengths in tokens.
        compute_capabilities, workspace_bytes, timing_cache, version_compatible, hardware_compatibility: see `build_engine`.

    Raises:
        DualmatchError: no bundle, or one whose `engines` leads out of it; the flavour's package is missing, an option that it does not
            have, or the graph does not build.
    """
    bundle = load_bundle(path)
    place = path / "engines"
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        kind = "a link, which may lead out of the bundle" if place.is_symlink() else "a file"
        raise DualmatchError(f"engines are kept in the folder {place}, which is {kind}; remove it.")
    lengths = _caption_lengths(bundle, length)
    if len(set(profiles)) != len(profiles):
        raise DualmatchError(f"a profile is asked for twice: {', '.join(profiles)}.")
    with tempfile.TemporaryDirectory(dir=path, prefix=".engines-") as building:
        records = []
        for name, entry in bundle.manifest.encoders.items():
            file = engine_file(name, flavour)
            left_out = () if entry.nodes is None else (entry.nodes.output.name,)
            record = build_engine(
                bundle.path / entry.engine_graph,
                Path(building) / Path(file).name,
                flavour=flavour,
                inputs=entry.inputs,
                profiles=[
                    profile_from_text(text, entry.inputs, length=lengths if name == "text" else None)
                    for text in profiles
                ],
                compute_capabilities=compute_capabilities,
                workspace_bytes=workspace_bytes,
                timing_cache=timing_cache,
                version_compatible=version_compatible,
                hardware_compatibility=hardware_compatibility,
                leave_out=left_out,
                progress=_named(progress, name),
            )
            record = replace(record, file=file)
            script = _script_of(file)
            write_atomically(
                Path(building) / Path(script).name,
                reproduce_script(record, graph=entry.engine_graph, script=Path(script).name, left_out=left_out),
            )
            records.append(record)
        # Unlisted before they are replaced: a kill in between costs the engines, not the bundle.
        kept = tuple(engine for engine in bundle.manifest.engines if engine["flavour"] != flavour)
        gone = {str(engine["file"]) for engine in bundle.manifest.engines} - {str(engine["file"]) for engine in kept}
        gone |= {_script_of(file) for file in gone}
        files = {name: entry for name, entry in bundle.manifest.files.items() if name not in gone}
        write_manifest(path, replace(bundle.manifest, engines=kept, files=files))
        place.mkdir(exist_ok=True)
        built = [file for record in records for file in (record.file, _script_of(record.file))]
        for file in built:
            (Path(building) / Path(file).name).replace(path / file)
    files |= {file: file_entry(path / file) for file in built}
    engines = (*kept, *(record.to_json() for record in records))
    write_manifest(path, replace(bundle.manifest, engines=engines, files=files))
    return records


def _script_of(engine: str) -> str:
    """The name of the script that builds an engine again."""
    return f"{engine.removesuffix('.engine')}.reproduce.py"


def _caption_lengths(bundle: Bundle, length: str | None) -> AxisRange:
    """Token counts of the text encoder's profiles, within what the bundle's tokenizer makes."""
    options = bundle.manifest.tokenizer
    limit = options.fixed_length or options.max_length
    asked = parse_axis_range(length, what="--length") if length else None
    if asked is not None and limit and asked.max > limit:
        raise DualmatchError(f"--length reaches {asked.max} tokens, but the bundle cuts captions at {limit}.")
    if options.fixed_length:
        return AxisRange(limit, limit, limit)
    longest = limit or DEFAULT_LENGTH
    return asked or AxisRange(1, min(16, longest), longest)


def _named(progress: Progress | None, encoder: str) -> Progress | None:
    """Reports that say which encoder they are about."""
    if progress is None:
        return None
    return lambda phase, done, of: progress(f"{encoder} encoder: {phase}", done, of)
