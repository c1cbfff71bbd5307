"""Strict dataclasses from mappings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from dualmatch.runtime.configs import check_range, from_mapping
from dualmatch.runtime.errors import DualmatchError


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int
    share: float = 0.5

    def __post_init__(self) -> None:
        check_range("share", self.share, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=lambda: Inner(width=1))
    kind: Literal["one", "two"] = "one"
    number: Literal[1, 2] = 1
    flag: bool = False
    limit: int | None = None
    size: int | str = 0
    pair: tuple[int, int] = (1, 2)
    words: tuple[str, ...] = ()
    facts: Mapping[str, int] = field(default_factory=dict)
    anything: Any = None


def test_every_kind_of_value():
    values = {
        "name": "x",
        "inner": {"width": 3, "share": 1},
        "kind": "two",
        "number": 2,
        "flag": True,
        "limit": None,
        "size": "wide",
        "pair": [3, 4],
        "words": ["a", "b"],
        "facts": {"k": 1},
        "anything": [1, "a"],
    }
    built = from_mapping(Outer, values, "the table")
    assert built == Outer(
        name="x",
        inner=Inner(width=3, share=1.0),
        kind="two",
        number=2,
        flag=True,
        limit=None,
        size="wide",
        pair=(3, 4),
        words=("a", "b"),
        facts={"k": 1},
        anything=[1, "a"],
    )
    assert isinstance(built.inner.share, float)


def test_defaults_are_kept():
    assert from_mapping(Outer, {"name": "x"}, "t") == Outer(name="x")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"name": "x", "knd": "one"}, "t has no option 'knd'; did you mean 'kind'?"),
        ({"name": "x", "zzz": 1}, "t has no option 'zzz'; it takes name, inner, kind,"),
        ({"name": "x", "inner": {"width": 1, "shar": 0.1}}, "t.inner has no option 'shar'; did you mean 'share'?"),
        ({}, "t lacks the option 'name'"),
        ({"name": "x", "inner": {}}, "t.inner lacks the option 'width'"),
        ({"name": 3}, "t.name must be of type str, got 3"),
        ({"name": "x", "inner": 5}, "t.inner must be a table, got 5"),
        ({"name": "x", "inner": {"width": "3"}}, "t.inner.width must be of type int, got '3'"),
        ({"name": "x", "inner": {"width": 3.0}}, "t.inner.width must be of type int, got 3.0"),
        ({"name": "x", "inner": {"width": True}}, "t.inner.width must be of type int, got True"),
        ({"name": "x", "inner": {"width": 1, "share": True}}, "t.inner.share must be of type float, got True"),
        ({"name": "x", "flag": 1}, "t.flag must be of type bool, got 1"),
        ({"name": "x", "flag": "true"}, "t.flag must be of type bool, got 'true'"),
        ({"name": "x", "kind": "three"}, "t.kind must be one of 'one', 'two', got 'three'"),
        ({"name": "x", "number": True}, "t.number must be one of 1, 2, got True"),
        ({"name": "x", "number": 1.0}, "t.number must be one of 1, 2, got 1.0"),
        ({"name": "x", "number": [1]}, "t.number must be one of 1, 2, got"),
        ({"name": "x", "limit": "3"}, "t.limit must be of type int, got '3'"),
        ({"name": "x", "size": 1.5}, "t.size must be of type int or str, got 1.5"),
        ({"name": "x", "pair": [1]}, "t.pair must have 2 entries, got 1"),
        ({"name": "x", "pair": [1, "2"]}, "t.pair[1] must be of type int, got '2'"),
        ({"name": "x", "words": "ab"}, "t.words must be a list, got 'ab'"),
        ({"name": "x", "facts": [1]}, "t.facts must be a table"),
        ({"name": "x", "facts": {"k": "v"}}, "t.facts.k must be of type int, got 'v'"),
        ({"name": "x", "inner": {"width": 1, "share": 2.0}}, "t.inner: share must lie between 0.0 and 1.0, got 2.0"),
    ],
)
def test_what_does_not_fit_is_refused(values, sentence):
    with pytest.raises(DualmatchError) as caught:
        from_mapping(Outer, values, "t")
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_check_range(value):
    with pytest.raises(DualmatchError, match=r"x must lie between 0 and 1"):
        check_range("x", value, 0, 1)
    check_range("x", 0, 0, 1)
    check_range("x", 1, 0, 1)
