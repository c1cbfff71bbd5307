"""Reads pickles without running them.

A pickle is a program. `interpret` takes its instructions one by one and answers the few that describe data; a class or function is only
ever a name here, compared with a list and never imported or called. What is on no list is refused by its name.

`torch.load(weights_only=True)` executes nothing either, but it lets 144 names through (torch 2.13) where a checkpoint needs seven, sets
memory aside before it knows whether the file can fill it, refuses strings of Python 2 above 255 bytes, and cannot read a vocabulary.
"""

import codecs
import pickletools
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from dualmatch.runtime.errors import DualmatchError

Builder = Callable[..., Any]


class RefusedError(Exception):
    """What stands in the way of reading, worded to follow "cannot be read:"."""


class Name(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Stream(Protocol):
    """Bytes to read instructions from; it never returns more than it holds, whatever length is asked for."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


def refuse(reason: str) -> NoReturn:
    """Stop reading."""
    raise RefusedError(reason)


# What a malformed program or archive runs into: an empty stack, an unknown memo, arguments and offsets that do not fit.
_MISREAD = (
    *(LookupError, ValueError, TypeError, ArithmeticError, EOFError, AttributeError, RuntimeError, OSError),
    struct.error,
)


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Within it, whatever is wrong with a file's contents becomes one sentence.

    Raises:
        DualmatchError: there is no such file, or its contents were refused or make no sense.
    """
    if not path.is_file():
        raise DualmatchError(f"there is no {kind} {path}.")
    try:
        yield
    except (RefusedError, zipfile.BadZipFile) as error:
        raise DualmatchError(f"the {kind} {path} cannot be read: {error}.") from None
    except _MISREAD as error:
        reason = str(error).partition("\n")[0]
        raise DualmatchError(
            f"the {kind} {path} cannot be read: it is damaged ({type(error).__name__}: {reason})."
        ) from None


_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("STRING", "SHORT_BINSTRING", "BINSTRING"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _instructions(stream: Stream) -> Iterator[tuple[str, Any]]:
    """Names of opcodes and their arguments, up to and with STOP."""
    while code := stream.read(1):
        opcode = _OPCODES.get(code)
        if opcode is None:
            refuse(f"byte {code!r} is no pickle instruction")
        if opcode.name == "STRING":  # Python 2's str, written as its repr; pickletools would insist on ASCII
            line = pickletools.read_stringnl(stream, decode=False)  # type: ignore[arg-type]
            yield opcode.name, codecs.escape_decode(line)[0].decode("latin-1")
        else:
            yield opcode.name, opcode.arg.reader(stream) if opcode.arg else None  # type: ignore[arg-type]
        if opcode.name == "STOP":
            return
    refuse("it is cut off")


def interpret(stream: Stream, builders: Mapping[str, Builder], storage: Builder | None = None) -> Any:
    """The object that a pickle describes, from any Python's protocol.

    Args:
        stream: stands behind the pickle's end afterwards.
        builders: for each permitted name, a function of the arguments that the pickle calls it with.
        storage: turns the description of a tensor's storage into what the builders take for one; None: the pickle may hold none.

    Raises:
        RefusedError: it holds more than data, or a name that is not permitted.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each open mark
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    for opcode, argument in _instructions(stream):
        if opcode in _LITERALS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode]())
        elif opcode in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if opcode == "MEMOIZE" else argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif opcode == "MARK":
            below.append(stack)
            stack = []
        elif opcode in _TUPLES:
            stack[-_TUPLES[opcode] :] = [tuple(stack[-_TUPLES[opcode] :])]
        elif opcode == "TUPLE":
            items = since_mark()
            stack.append(tuple(items))
        elif opcode == "LIST":
            items = since_mark()
            stack.append(items)
        elif opcode == "DICT":
            items = since_mark()
            stack.append({})
            fill(stack[-1], items)
        elif opcode in ("APPEND", "APPENDS"):
            items = since_mark() if opcode == "APPENDS" else [stack.pop()]
            _expect(stack[-1], list).extend(items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = since_mark() if opcode == "SETITEMS" else [stack.pop(-2), stack.pop()]
            fill(_expect(stack[-1], dict), items)
        elif opcode in ("GLOBAL", "STACK_GLOBAL", "INST"):
            module, name = (stack.pop(-2), stack.pop()) if opcode == "STACK_GLOBAL" else argument.split(" ", 1)
            found = Name(module, name)
            if str(found) not in builders:
                refuse(f"it names {found}, which is no plain data")
            if opcode == "INST":
                refuse(f"it makes a {found} in a way that plain data does not need")
            stack.append(found)
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments = _expect(stack.pop(), tuple)
            stack.append(builders[str(_expect(stack.pop(), Name))](*arguments))
        elif opcode == "BUILD":
            state = stack.pop()
            _set_state(stack[-1], state)
        elif opcode == "BINPERSID" and storage is not None:
            stack.append(storage(*_expect(stack.pop(), tuple)))
        elif opcode == "STOP":
            return stack.pop()
        elif opcode not in ("PROTO", "FRAME"):
            refuse(f"it uses the pickle instruction {opcode}, which plain data does not need")
    raise AssertionError("instructions end with STOP")


def fill(target: dict[Any, Any], items: list[Any]) -> None:
    """Add keys and values, which alternate, to a dictionary."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        # A tuple can be nested so deep that hashing it crashes the interpreter.
        if not isinstance(key, str | int | float):
            refuse(f"it has a {type(key).__name__} as the key of a dictionary")
        target[key] = value


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        refuse(f"it uses a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _set_state(target: Any, state: Any) -> None:
    """The instruction that gives an object its attributes."""
    if isinstance(target, Namespace):
        if not all(isinstance(name, str) for name in _expect(state, dict)):
            refuse("an attribute's name is no string")
        vars(target).update(state)
    elif isinstance(target, Float64):
        target.byte_order = _expect(state, tuple)[1]
    # An OrderedDict's attributes are PyTorch's module versions: nothing that is read here depends on them.
    elif not isinstance(target, dict):
        refuse(f"it gives attributes to a {type(target).__name__}")


# Builders: what stands for the permitted names.


class Float64:
    """NumPy's type of a scalar; its byte order comes in an instruction of its own."""

    byte_order: Any = "<"


def _encoded(text: str, encoding: str) -> bytes:
    """Python 3's bytes in the protocol that Python 2 knew."""
    if encoding != "latin1":
        refuse(f"it encodes bytes as {encoding!r}")
    return text.encode("latin-1")


def _dtype(code: str, *_: Any) -> Float64:
    if code != "f8":
        refuse(f"it holds a NumPy scalar of type {code!r}, where only float64 is known")
    return Float64()


def _scalar(dtype: Float64, value: str | bytes) -> float:
    if not isinstance(dtype, Float64) or dtype.byte_order not in ("<", ">"):
        refuse("it holds a NumPy scalar that is no float64")
    raw = value.encode("latin-1") if isinstance(value, str) else value
    return float(struct.unpack(f"{dtype.byte_order}d", raw)[0])


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    """Python 3 fills it by later instructions, Python 2 from a list of pairs."""
    built: dict[Any, Any] = {}
    for key, value in pairs:
        fill(built, [key, value])
    return built


def _bare_namespace() -> Namespace:
    return Namespace()


def _never_called(*_: Any) -> NoReturn:
    refuse("it calls what is only a type's name")


def object_builders(*classes: str) -> dict[str, Builder]:
    """Builders for objects that are no more than their attributes, all read as a Namespace.

    Args:
        classes: their full names.
    """

    def rebuilt(kind: Name, base: Name, state: None) -> Namespace:
        """Protocols 0 and 1: copyreg._reconstructor(class, object, None)."""
        if str(kind) not in classes or _expect(base, Name).name != "object" or state is not None:
            refuse("it rebuilds an object from more than its attributes")
        return Namespace()

    return {
        **dict.fromkeys(classes, _bare_namespace),
        **dict.fromkeys(("copy_reg._reconstructor", "copyreg._reconstructor"), rebuilt),
        **dict.fromkeys(("__builtin__.object", "builtins.object"), _never_called),
    }


DATA_BUILDERS: Mapping[str, Builder] = {
    "_codecs.encode": _encoded,
    "collections.OrderedDict": _ordered_dict,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
