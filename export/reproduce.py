"""The script beside each engine: builds it again from the bundle's graph with nothing but TensorRT's own package."""

from pprint import pformat

from dualmatch.runtime.backends.engine_record import EngineRecord
from dualmatch.runtime.flavours import FLAVOURS

_SCRIPT = '''#!/usr/bin/env python3
"""Builds {engine} again from ../{graph}, as `dualmatch compile` built it; needs only the package {module}.

    python {script} [OUT]

OUT is {again} in the working directory by default. Two builds of one graph may differ in a few bytes: TensorRT times
kernels, and orders independent layers now one way, now another. So the new engine's hash is compared and told, not required.
"""

import hashlib
import sys
from pathlib import Path

import {module} as trt

GRAPH = Path(__file__).resolve().parent.parent / {graph!r}
GRAPH_SHA256 = {graph_sha256!r}
ENGINE_SHA256 = {engine_sha256!r}
TENSORRT_VERSION = {version!r}
WORKSPACE_BYTES = {workspace!r}
COMPUTE_CAPABILITIES = {capabilities!r}
VERSION_COMPATIBLE = {version_compatible!r}
HARDWARE_COMPATIBILITY = {hardware!r}
# For every optimisation profile: input, then its smallest, its tuned-for and its largest shape.
PROFILES = {profiles}


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else {again!r})
    if trt.__version__ != TENSORRT_VERSION:
        print(f"the engine was built by {module} {{TENSORRT_VERSION}}, this is {{trt.__version__}}", file=sys.stderr)
    data = GRAPH.read_bytes()
    if hashlib.sha256(data).hexdigest() != GRAPH_SHA256:
        sys.exit(f"{{GRAPH}} is not the graph that the engine was built from")
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    # Ignored from TensorRT 11 on, where every network is strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(GRAPH)):
        sys.exit("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
{leave_out}    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for shapes in PROFILES:
        profile = builder.create_optimization_profile()
        for name, (smallest, tuned, largest) in shapes.items():
            profile.set_shape(name, smallest, tuned, largest)
        config.add_optimization_profile(profile)
    if WORKSPACE_BYTES is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
{options}    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit("the build failed")
    engine = bytes(plan)
    out.write_bytes(engine)
    same = hashlib.sha256(engine).hexdigest() == ENGINE_SHA256
    print(f"{{out}}: {{len(engine)}} bytes, {{'the same bytes as' if same else 'not byte for byte'}} {engine}")


if __name__ == "__main__":
    main()
'''

_LEAVE_OUT = """    for tensor in [network.get_output(index) for index in range(network.num_outputs)]:
        if tensor.name in {names!r}:
            network.unmark_output(tensor)
"""
_RTX_OPTIONS = """    if COMPUTE_CAPABILITIES:
        config.num_compute_capabilities = len(COMPUTE_CAPABILITIES)
        for index, capability in enumerate(COMPUTE_CAPABILITIES):
            config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), index)
"""
_TENSORRT_OPTIONS = """    if VERSION_COMPATIBLE:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if HARDWARE_COMPATIBILITY != "none":
        level = HARDWARE_COMPATIBILITY.replace("-", "_").upper()
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
"""


def reproduce_script(record: EngineRecord, *, graph: str, script: str, left_out: tuple[str, ...] = ()) -> str:
    """The script's text.

    Args:
        graph: the ONNX file's name in the bundle, one folder above the script.
        script: the script's own name.
        left_out: outputs of the graph that the engine does not give.
    """
    rtx = record.flavour == "tensorrt-rtx"
    engine = record.file.rpartition("/")[2]
    profiles = [
        {name: (shapes.min, shapes.opt, shapes.max) for name, shapes in profile.shapes.items()}
        for profile in record.profiles
    ]
    return _SCRIPT.format(
        engine=engine,
        again=f"{engine.removesuffix('.engine')}.again.engine",
        graph=graph,
        script=script,
        module=FLAVOURS[record.flavour],
        graph_sha256=record.onnx_sha256,
        engine_sha256=record.sha256,
        version=record.tensorrt_version,
        workspace=record.workspace_bytes,
        capabilities=record.compute_capabilities if rtx else (),
        version_compatible=record.version_compatible,
        hardware=record.hardware_compatibility,
        profiles=pformat(profiles, width=110, sort_dicts=False),
        leave_out=_LEAVE_OUT.format(names=left_out) if left_out else "",
        options=_RTX_OPTIONS if rtx else _TENSORRT_OPTIONS,
    )
