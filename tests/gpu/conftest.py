"""The ring that needs a CUDA GPU. Without one every test here says "not run"."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from dualmatch.export.compile import compile_bundle
from dualmatch.runtime.backends import open_encoder
from dualmatch.runtime.bundle import load_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.flavours import FLAVOURS, gpu_compute_capability


def why_no_gpu() -> str | None:
    try:
        gpu_compute_capability()
    except DualmatchError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=f"not run: {reason}"))


@pytest.fixture(scope="session")
def bundles(small_run: Any, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small run at every precision, whatever its gate says of so few pairs."""
    from dualmatch.export.bundle import Precision, export_run
    from dualmatch.training.checkpoint import load_run

    found = {"fp32": small_bundle}
    precisions: tuple[Precision, ...] = ("fp16", "int8")
    for precision in precisions:
        found[precision] = tmp_path_factory.mktemp("bundles") / precision
        export_run(
            load_run(small_run.folder), small_run.dataset, found[precision], precision=precision, unverified=True
        )
    return found


@pytest.fixture(scope="session", params=list(FLAVOURS))
def flavour(request: pytest.FixtureRequest) -> str:
    if importlib.util.find_spec(FLAVOURS[request.param]) is None:
        pytest.skip(f"not run: {FLAVOURS[request.param]} is not installed")
    return str(request.param)


@pytest.fixture(scope="session", params=["fp32", "fp16", "int8"])
def compiled(
    request: pytest.FixtureRequest,
    flavour: str,
    bundles: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle with engines of the flavour for this GPU; skipped, with TensorRT-RTX's own words, where it does not support the GPU."""
    path = tmp_path_factory.mktemp("compiled") / "bundle"
    shutil.copytree(bundles[request.param], path)
    compile_bundle(path, flavour=flavour, profiles=["latency", "1:4:8"])
    try:
        open_encoder(load_bundle(path), "image", backend=flavour).close()
    except DualmatchError as error:
        if flavour == "tensorrt-rtx" and " refuses " in str(error):
            pytest.skip(f"not run: {error}")
        raise
    return path
