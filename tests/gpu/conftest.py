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
def half_bundle(small_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run exported at fp16, whatever its gate says of so few pairs."""
    from dualmatch.export.bundle import export_run
    from dualmatch.training.checkpoint import load_run

    out = tmp_path_factory.mktemp("half-bundle") / "bundle"
    export_run(load_run(small_run.folder), small_run.dataset, out, precision="fp16", unverified=True)
    return out


@pytest.fixture(scope="session", params=list(FLAVOURS))
def flavour(request: pytest.FixtureRequest) -> str:
    if importlib.util.find_spec(FLAVOURS[request.param]) is None:
        pytest.skip(f"not run: {FLAVOURS[request.param]} is not installed")
    return str(request.param)


@pytest.fixture(scope="session", params=["fp32", "fp16"])
def compiled(
    request: pytest.FixtureRequest,
    flavour: str,
    small_bundle: Path,
    half_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle with engines of the flavour for this GPU; skipped, with TensorRT-RTX's own words, where it does not support the GPU."""
    path = tmp_path_factory.mktemp("compiled") / "bundle"
    shutil.copytree(small_bundle if request.param == "fp32" else half_bundle, path)
    compile_bundle(path, flavour=flavour, profiles=["latency", "1:4:8"])
    try:
        open_encoder(load_bundle(path), "image", backend=flavour).close()
    except DualmatchError as error:
        if flavour == "tensorrt-rtx" and " refuses " in str(error):
            pytest.skip(f"not run: {error}")
        raise
    return path
