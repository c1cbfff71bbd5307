"""A graph's stages in a process of its own: the file as deployment will find it, with nothing of its maker's memory.

The parent hands over torch's outputs as a file, so the child needs no torch: `python -m dualmatch.runtime.fresh FOLDER`.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import load_file, save_file

from .backends import open_session
from .configs import from_mapping
from .errors import DualmatchError
from .files import read_json
from .stages import Array, Contract, GraphCheck, check_session, not_loaded

JOB, TENSORS, RESULT = "job.json", "checks.safetensors", "result.json"


def check_in_fresh_process(
    path: Path, contract: Contract, checks: Sequence[Mapping[str, Array]], graph: str
) -> GraphCheck:
    """Take the ONNX file at `path` through the stages, on onnxruntime's CPU provider.

    Args:
        checks: real inputs by name, and as `embedding` what torch gives for them.
        graph: what the stages call it.

    Returns:
        What the child found; a child that dies (a crash inside the backend, no memory) fails the first stage.
    """
    with TemporaryDirectory(prefix="dualmatch-gate-") as name:
        folder = Path(name)
        tensors = {
            f"{i}.{key}": np.ascontiguousarray(value) for i, one in enumerate(checks) for key, value in one.items()
        }
        save_file(tensors, folder / TENSORS)
        job = {"path": str(path.resolve()), "graph": graph, "num_checks": len(checks), "contract": asdict(contract)}
        (folder / JOB).write_text(json.dumps(job))
        # -P: a file that is called numpy.py where the user happens to stand is not numpy.
        command = [sys.executable, "-P", "-m", "dualmatch.runtime.fresh", name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
        if done.returncode == 0:
            return from_mapping(GraphCheck, read_json(folder / RESULT, "the gate's fresh process"), "its result")
    return not_loaded(graph, f"the process that opened it {_ending(done.returncode, done.stderr)}")


def main(folder: Path) -> None:
    """The child."""
    job = read_json(folder / JOB, "the gate's job")
    contract = from_mapping(Contract, job["contract"], "contract")
    checks: list[dict[str, Array]] = [{} for _ in range(job["num_checks"])]
    for name, value in load_file(folder / TENSORS).items():
        number, key = name.split(".", 1)
        checks[int(number)][key] = value
    try:
        with open_session(Path(job["path"])) as session:
            found = check_session(session, contract, checks, job["graph"])
    except DualmatchError as error:
        found = not_loaded(job["graph"], str(error))
    (folder / RESULT).write_text(json.dumps(asdict(found)))


def _ending(code: int, stderr: str) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"failed: {(stderr.strip().splitlines() or ['it said nothing'])[-1]}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
