"""Reads other people's pickles without running them: PyTorch checkpoints of both file formats, and vocabulary pickles.

A pickle is a program. This module reads its instructions one by one and answers the few that describe data; a class or function is
only ever a name here, compared with a short list and never imported or called. What is on no list is refused by its name.
`torch.load(weights_only=True)` is safe too, but it lets through some 140 names where seven do, sets memory aside before it knows that the
file can fill it, does not read the strings of Python 2 that are longer than 255 bytes, and cannot read vocabularies.
"""

import codecs
import mmap
import pickletools
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from dualmatch.runtime.errors import DualmatchError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("STRING", "SHORT_BINSTRING", "BINSTRING"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _Refused(Exception):  # noqa: N818  (becomes a DualmatchError that also names the file)
    """What stands in the way, as the end of a sentence."""


class _Name(NamedTuple):
    """A class or function that the pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class _Float64:
    """NumPy's float64, as a pickle describes it: its byte order comes in a second instruction."""

    order: str = "<"


@dataclass(frozen=True)
class _Storage:
    """The numbers that tensors are views of."""

    flat: Tensor


_Builder = Callable[..., Any]


def _refuse(reason: str) -> NoReturn:
    raise _Refused(reason)


def _instructions(stream: Any) -> Iterator[tuple[str, Any]]:
    """Opcode names and arguments, up to and with STOP."""
    while True:
        code = stream.read(1)
        if not code:
            _refuse("it is cut off")
        opcode = _OPCODES.get(code)
        if opcode is None:
            _refuse(f"byte {code!r} is no pickle instruction")
        if opcode.name == "STRING":  # Python 2's str, by its repr; pickletools would insist on ASCII
            line = pickletools.read_stringnl(stream, decode=False)
            argument: Any = codecs.escape_decode(line)[0].decode("latin-1")  # type: ignore[attr-defined]
        else:
            argument = opcode.arg.reader(stream) if opcode.arg else None
        yield opcode.name, argument
        if opcode.name == "STOP":
            return


def _interpret(stream: Any, builders: Mapping[str, _Builder], storage: Callable[[Any], _Storage] | None = None) -> Any:
    """The object that a pickle describes.

    Args:
        stream: has read, readline.
        builders: what stands for each permitted name: a function of the arguments that the pickle calls it with.
        storage: a storage from its description, in PyTorch's files.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = len(stack) - 1 - stack[::-1].index(_MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    def build(name: Any, arguments: Any) -> Any:
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            _refuse("it calls something that is no name")
        return builders[str(name)](*arguments)

    for opcode, argument in _instructions(stream):
        if opcode in _LITERALS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode]())
        elif opcode in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif opcode == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif opcode == "MARK":
            stack.append(_MARK)
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode in ("TUPLE", "LIST"):
            items = since_mark()
            stack.append(tuple(items) if opcode == "TUPLE" else items)
        elif opcode in ("APPEND", "APPENDS"):
            items = since_mark() if opcode == "APPENDS" else [stack.pop()]
            _expect(stack[-1], list).extend(items)
        elif opcode in ("SETITEM", "SETITEMS", "DICT"):
            items = [stack.pop(-2), stack.pop()] if opcode == "SETITEM" else since_mark()
            if opcode == "DICT":
                stack.append({})
            _fill(_expect(stack[-1], dict), items)
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            module, name = argument.split(" ", 1) if opcode == "GLOBAL" else (stack.pop(-2), stack.pop())
            found = _Name(module, name)
            if str(found) not in builders:
                _refuse(f"it names {found}, which is no plain data")
            stack.append(found)
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(build(stack.pop(), arguments))
        elif opcode == "BUILD":
            state = stack.pop()
            _set_state(stack[-1], state)
        elif opcode == "BINPERSID" and storage is not None:
            stack.append(storage(stack.pop()))
        elif opcode == "STOP":
            return stack.pop()
        elif opcode not in ("PROTO", "FRAME"):
            _refuse(f"it uses the pickle instruction {opcode}, which plain data does not need")
    raise AssertionError("a pickle ends with STOP")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        _refuse(f"it fills a {type(value).__name__} as if it were a {kind.__name__}")
    return value


def _fill(target: dict[Any, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float):  # a tuple can be nested so deep that hashing it crashes the interpreter
            _refuse(f"it has a {type(key).__name__} as the key of a dictionary")
        target[key] = value


def _set_state(target: Any, state: Any) -> None:
    """The instruction that gives an object its attributes."""
    if isinstance(target, Namespace):
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            _refuse("the attributes of a Namespace are no dictionary")
        vars(target).update(state)
    elif isinstance(target, _Float64):
        target.order = state[1]
    elif not isinstance(target, dict):  # an OrderedDict's attributes: PyTorch's module versions, which mean nothing here
        _refuse(f"it gives attributes to a {type(target).__name__}")


# Builders: what stands for each permitted name.


def _namespace(*arguments: Any) -> Namespace:
    if arguments:
        _refuse("a Namespace is made with arguments")
    return Namespace()


def _reconstructed(kind: Any, base: Any, state: Any) -> Namespace:
    """How protocols 0 and 1 make an object: copyreg._reconstructor(class, object, None)."""
    if not (isinstance(kind, _Name) and kind.name in ("Namespace", "Vocabulary") and isinstance(base, _Name)):
        _refuse("an object is rebuilt from something that is no class")
    if base.name != "object" or state is not None:
        _refuse(f"{kind} is rebuilt from more than its attributes")
    return Namespace()


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    built: dict[Any, Any] = {}
    if arguments:  # Python 2 writes its items as one list of pairs
        (pairs,) = arguments
        _fill(built, [part for pair in pairs for part in _pair(pair)])
    return built


def _pair(pair: Any) -> Any:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        _refuse("an OrderedDict's items are no pairs")
    return pair


def _encoded(text: str, encoding: str) -> bytes:
    """Python 3's bytes under protocol 2."""
    if encoding != "latin1":
        _refuse(f"it encodes bytes as {encoding!r}")
    return text.encode("latin-1")


def _dtype(code: str, *_: Any) -> _Float64:
    if code != "f8":
        _refuse(f"it holds a NumPy scalar of type {code!r}; only float64 is read")
    return _Float64()


def _scalar(dtype: Any, value: Any) -> float:
    if not isinstance(dtype, _Float64) or dtype.order not in ("<", ">"):
        _refuse("it holds a NumPy scalar that is no float64")
    raw = value.encode("latin-1") if isinstance(value, str) else value
    return float(np.frombuffer(raw, dtype=f"{dtype.order}f8", count=1)[0])


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2 (gradients and hooks are left out)."""
    if not isinstance(storage, _Storage):
        _refuse("a tensor has no storage")
    if not all(isinstance(number, int) and number >= 0 for number in (offset, *size, *stride)):
        _refuse("a tensor's shape is no list of sizes")
    flat = storage.flat
    count = 1
    for length in size:
        count *= length
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    # Every element must be the file's own: a step of 0 could claim any size.
    if count > len(flat) or (count and last >= len(flat)):
        _refuse(f"a tensor of shape {list(size)} is larger than its storage of {len(flat)} numbers")
    return flat.as_strided(size, stride, offset).clone()


_PLAIN: dict[str, _Builder] = {
    "_codecs.encode": _encoded,
    "collections.OrderedDict": _ordered_dict,
}


def _never(*_: Any) -> NoReturn:
    _refuse("it calls a name that stands for a type")


_CHECKPOINT: dict[str, _Builder] = {
    **_PLAIN,
    **{f"torch.{storage}": _never for storage in _DTYPES},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "argparse.Namespace": _namespace,
    "copy_reg._reconstructor": _reconstructed,
    "copyreg._reconstructor": _reconstructed,
    "__builtin__.object": _never,
    "builtins.object": _never,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
