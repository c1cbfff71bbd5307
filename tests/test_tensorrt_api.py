"""Every name, signature and settable property of TensorRT and CUDA that our sources use, checked against the packages that are installed.

The sources are read, not run: without a GPU most of these lines cannot run. What can run without one (cuda-bindings answers with a
status) is called.
"""

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from dualmatch.export.reproduce import reproduce_script
from dualmatch.runtime.backends.cuda import Cuda, Stickiness
from dualmatch.runtime.backends.engine_record import EngineRecord, Profile, ShapeRange
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.flavours import FLAVOURS, gpu_compute_capability

from .fake_tensorrt import TWO_VALUES, FakeContext, FakeCudart, FakeEngine

ROOT = Path(__file__).parents[1]
FILES = (
    "export/engine.py",
    "runtime/flavours.py",
    "runtime/backends/cuda.py",
    "runtime/backends/tensorrt.py",
    "runtime/backends/tensorrt_lane.py",
)
# What a variable of this name is, in all of these files; None: nothing of TensorRT or CUDA.
CLASS_OF = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "result": "IOptimizationProfile",
    "runtime": "Runtime",
    "runtime_config": "IRuntimeConfig",
    "tensor": "ITensor",
}
HANDLES = {"log", "trt", "cudart", "graph", "stream", "event", "executable", "status", "diagnostics", "severity"}
RTX_ONLY = {"IRuntimeConfig", "ComputeCapability", "CudaGraphStrategy", "EngineValidity", "EngineInvalidityDiagnostics"}


def installed(module):
    return importlib.util.find_spec(module) is not None


flavours = pytest.mark.parametrize(
    "module",
    [
        pytest.param(name, marks=pytest.mark.skipif(not installed(name), reason=f"{name} is not installed"))
        for name in FLAVOURS.values()
    ],
)
cuda_bindings = pytest.mark.skipif(not installed("cuda"), reason="cuda-bindings is not installed")


def script(flavour):
    shapes = {"x": ShapeRange((1, 4), (2, 4), (3, 4))}
    record = EngineRecord(
        flavour=flavour,
        tensorrt_version="1",
        compute_capabilities=("8.6",),
        profiles=(Profile(name="own", shapes=shapes),),
        file=f"engines/text_encoder.{flavour}.engine",
        sha256="0" * 64,
        bytes=1,
        onnx_sha256="0" * 64,
        seconds=1.0,
        strongly_typed=True,
    )
    text = reproduce_script(record, graph="text_encoder.onnx", script="again.py", left_out=("nodes",))
    return text.replace("profile = builder", "result = builder").replace("profile.set_shape", "result.set_shape")


def sources():
    yield from ((name, ast.parse((ROOT / name).read_text())) for name in FILES)
    yield from ((f"script of {flavour}", ast.parse(script(flavour))) for flavour in FLAVOURS)


def chain(node):
    """`a.b.c` as ("a", "b", "c"), a leading `self` left out; None for anything else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    names.append(node.id)
    names.reverse()
    if names[0] == "self":  # self._engine is an engine too
        names = [names[1].removeprefix("_"), *names[2:]]
    return tuple(names)


def uses():
    """(where, receiver, names after it, the call or None, whether it is assigned to) of everything that is TensorRT's or CUDA's."""
    for name, tree in sources():
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or id(node) in inner:
                continue
            names = chain(node)
            if names is None or len(names) < 2:
                continue
            if names[0] in CLASS_OF or names[0] in ("trt", "cudart"):
                where = f"{name}:{node.lineno}: {'.'.join(names)}"
                yield where, names[0], names[1:], calls.get(id(node)), isinstance(node.ctx, ast.Store)


USES = list(uses())


def test_the_walk_sees_what_the_sources_use():
    seen = {(receiver, *names) for _, receiver, names, _, _ in USES}
    assert len(seen) > 90
    for one in [
        ("trt", "BuilderFlag", "VERSION_COMPATIBLE"),
        ("trt", "BuilderFlag", "TF32"),
        ("config", "clear_flag"),
        ("trt", "Runtime"),
        ("cudart", "cudaGraphInstantiate"),
        ("context", "execute_async_v3"),
        ("engine", "get_device_memory_size_for_profile_v2"),
        ("runtime_config", "cuda_graph_strategy"),
        ("config", "hardware_compatibility_level"),
        ("cache", "serialize"),
        ("parser_error", "desc"),
    ]:
        assert one in seen, one


def test_no_variable_that_may_be_tensorrts_escapes_the_walk():
    """A parameter or attribute typed `Any` in these files is one whose class the table knows, or a plain handle."""
    known = CLASS_OF.keys() | HANDLES
    for name in FILES:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.arg) and node.annotation is not None and ast.unparse(node.annotation) == "Any":
                assert node.arg in known, f"{name}:{node.lineno}: {node.arg}"


def missing_here(module, receiver, names):
    """`tensorrt` lacks what only TensorRT-RTX has; our sources use it in the branch of that flavour."""
    first = names[0] if receiver == "trt" else CLASS_OF[receiver]
    return module == "tensorrt" and (first in RTX_ONLY or names[-1] in {"get_engine_validity", "create_runtime_config", "num_compute_capabilities", "set_compute_capability"})  # fmt: skip


def resolved(module, receiver, names):
    value = module if receiver == "trt" else getattr(module, CLASS_OF[receiver])
    for name in names:
        value = (
            inspect.getattr_static(value, name)
            if inspect.isclass(value) and name == names[-1]
            else getattr(value, name)
        )
    return value


@flavours
def test_every_name_exists(module):
    trt = importlib.import_module(module)
    absent = []
    for where, receiver, names, _, _ in USES:
        if receiver == "cudart" or missing_here(module, receiver, names):
            continue
        try:
            resolved(trt, receiver, names)
        except AttributeError:
            absent.append(where)
    assert not absent


def signatures(doc, name):
    """From a pybind11 docstring: for each overload its parameters as (name, has a default), without self."""
    found = []
    for line in re.findall(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", doc or "", flags=re.MULTILINE):
        if line == "*args, **kwargs":
            continue
        parts = re.split(r",\s*(?![^\[\]<>()]*[\]>)])", line)
        parameters = [(part.split(":")[0].strip(), "=" in part) for part in parts if part]
        found.append(parameters[1:])
    return found


def accepts(parameters, call):
    """Whether a call's arguments, by number and by name, fit an overload."""
    names = [name for name, _ in parameters]
    given = names[: len(call.args)] + [keyword.arg for keyword in call.keywords]
    needed = {name for name, default in parameters if not default}
    return (
        len(call.args) <= len(names)
        and set(given) <= set(names)
        and len(set(given)) == len(given)
        and needed <= set(given)
    )


def test_the_signature_reader_can_say_no():
    doc = "f(*args, **kwargs)\n1. f(self: m.C, a: int, b: m.D = <E.X: 0>) -> bool\n2. f(self: m.C, c: list[int]) -> bool\n"
    assert signatures(doc, "f") == [[("a", False), ("b", True)], [("c", False)]]

    def fits(text):
        return any(accepts(parameters, ast.parse(text).body[0].value) for parameters in signatures(doc, "f"))

    assert all(map(fits, ["f(1)", "f(1, 2)", "f(1, b=2)", "f(c=1)"]))
    assert not any(map(fits, ["f()", "f(1, 2, 3)", "f(1, c=2)", "f(d=1)", "f(b=1)"]))


@flavours
def test_every_call_fits_a_signature(module):
    trt = importlib.import_module(module)
    wrong, checked = [], 0
    for where, receiver, names, call, _ in USES:
        if call is None or receiver == "cudart" or missing_here(module, receiver, names):
            continue
        # `set_shape(name, *shapes)` is checked by building, a constructor of our subclass by making one.
        if any(isinstance(argument, ast.Starred) for argument in call.args) or any(n.startswith("__") for n in names):
            continue
        owner = trt if receiver == "trt" else getattr(trt, CLASS_OF[receiver])
        for name in names:
            function = getattr(owner, name)
            if name != names[-1]:
                owner = function
        called = names[-1]
        if inspect.isclass(function):
            function, called = function.__init__, "__init__"
        if (
            not getattr(function, "__doc__", None) or f"{called}(" not in function.__doc__
        ):  # a Python function of the package
            inspect.signature(function)
            checked += 1
            continue
        checked += 1
        if not any(accepts(parameters, call) for parameters in signatures(function.__doc__, called)):
            wrong.append(f"{where}{ast.unparse(call)}: {signatures(function.__doc__, called)}")
    assert not wrong
    assert checked > 40


@flavours
def test_every_property_that_is_set_can_be_set(module):
    trt = importlib.import_module(module)
    stored = [use for use in USES if use[4] and use[1] in CLASS_OF]
    assert {names for _, _, names, _, _ in stored} == {
        ("progress_monitor",),
        ("hardware_compatibility_level",),
        ("num_compute_capabilities",),
        ("cuda_graph_strategy",),
        ("engine_host_code_allowed",),
    }
    for where, receiver, names, _, _ in stored:
        if not missing_here(module, receiver, names):
            assert resolved(trt, receiver, names).fset is not None, where


@flavours
def test_answers_that_the_code_relies_on(module):
    """What each call gives back, where an unpacking or an `if` depends on it."""
    trt = importlib.import_module(module)
    returns = {
        ("ICudaEngine", "get_tensor_profile_shape"): "list",
        ("ICudaEngine", "get_device_memory_size_for_profile_v2"): "int",
        ("IExecutionContext", "execute_async_v3"): "bool",
        ("IExecutionContext", "set_input_shape"): "bool",
        ("IExecutionContext", "set_tensor_address"): "bool",
        ("IExecutionContext", "set_optimization_profile_async"): "bool",
        ("IExecutionContext", "set_device_memory"): "None",
        ("IExecutionContext", "get_tensor_shape"): "Dims",
        ("Runtime", "get_engine_validity"): "tuple",
    }
    for (owner, name), kind in returns.items():
        if not missing_here(module, "runtime", (name,)):
            answers = re.findall(
                rf"^(?:\d+\. )?{name}\(.*\) -> (.*)$", getattr(getattr(trt, owner), name).__doc__, re.MULTILINE
            )
            assert answers
            assert all(kind in answer for answer in answers), (name, answers)


@flavours
def test_the_fake_has_no_method_that_tensorrt_has_not(module):
    trt = importlib.import_module(module)
    for fake, real in ((FakeContext, trt.IExecutionContext), (FakeEngine, trt.ICudaEngine)):
        own = {name for name in vars(fake) if not name.startswith("_")}
        assert own <= set(dir(real))


# CUDA.

CUDA_USES = [use for use in USES if use[1] == "cudart"]


@cuda_bindings
def test_every_cuda_name_exists_and_every_call_fits():
    from cuda.bindings import runtime as cudart

    assert len({names for _, _, names, _, _ in CUDA_USES}) > 30
    for where, _, names, call, _ in CUDA_USES:
        value = cudart
        for name in names:
            assert hasattr(value, name), where
            value = getattr(value, name)
        if call is not None:
            assert not call.keywords
            inspect.signature(value).bind(*call.args)


def gpu_is_here():
    try:
        return bool(gpu_compute_capability())
    except DualmatchError:
        return False


@cuda_bindings
@pytest.mark.skipif(gpu_is_here(), reason="there is a GPU, which these calls with empty handles would reach")
def test_cuda_calls_answer_with_as_many_values_as_the_fake():
    """cuda-bindings converts the arguments and answers with a status also where there is no driver."""
    from cuda.bindings import runtime as cudart

    example = {"mode": cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal, "kind": cudart.cudaMemcpyKind.cudaMemcpyHostToDevice,
               "attr": cudart.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor, "error": cudart.cudaError_t.cudaErrorUnknown}  # fmt: skip
    functions = {names[0] for _, _, names, call, _ in CUDA_USES if call is not None and len(names) == 1}
    for name in sorted(functions):
        function = getattr(cudart, name)
        answer = function(*[example.get(parameter, 0) for parameter in inspect.signature(function).parameters])
        assert isinstance(answer[0], cudart.cudaError_t)
        assert len(answer) == 1 + (name in TWO_VALUES or name == "cudaDeviceGetAttribute"), name
        assert name == "cudaDeviceGetAttribute" or hasattr(FakeCudart, name), name


@cuda_bindings
@pytest.mark.skipif(gpu_is_here(), reason="there is a GPU")
def test_without_a_gpu_every_use_of_it_is_refused_in_words():
    from cuda.bindings import runtime as cudart

    for use in (
        lambda cuda: cuda.device_memory(8),
        lambda cuda: cuda.pinned_memory(8),
        lambda cuda: cuda.stream(),
        lambda cuda: cuda.event(),
        lambda cuda: cuda.upload(0, 0, 8, cudart.cudaStream_t(0)),
        lambda cuda: cuda.capture(cudart.cudaStream_t(0), lambda: None),
        lambda cuda: cuda.device_name(),
    ):
        with pytest.raises(DualmatchError, match=r"failed with cudaError\w+ \("):
            use(Cuda(cudart, Stickiness()))


@cuda_bindings
def test_handles_of_streams_become_the_integers_that_tensorrt_takes():
    from cuda.bindings import runtime as cudart

    assert int(cudart.cudaStream_t(5)) == 5
