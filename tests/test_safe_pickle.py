"""Foreign pickles: what is data comes through as torch and pickle would give it; anything else is refused and executes nothing."""

import argparse
import builtins
import collections
import io
import os
import pickle
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from dualmatch.models.authors import read_checkpoint
from dualmatch.models.authors_files import read_torch_file, read_vocabulary
from dualmatch.runtime.errors import DualmatchError

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "dog", "café", "中"]
# Pickles of the class Vocabulary that Python 2.7 wrote, protocols 0, 1 and 2; "na\xefve" is a byte string, the two before it are text.
PYTHON_2 = [
    b"ccopy_reg\n_reconstructor\np0\n(c__main__\nVocabulary\np1\nc__builtin__\nobject\np2\nNtp3\nRp4\n(dp5\nS'idx2word'\np6\n(dp7\nI0\nS'<pad>'\np8\nsI1\nS'<start>'\np9\nsI2\nS'<end>'\np10\nsI3\nS'<unk>'\np11\nsI4\nVcaf\xe9\np12\nsI5\nV\\u4e2d\np13\nsI6\nS'na\\xefve'\np14\nssS'word2idx'\np15\n(dp16\ng9\nI1\nsg10\nI2\nsg13\nI5\nsg8\nI0\nsg14\nI6\nsg12\nI4\nsg11\nI3\nssS'idx'\np17\nI7\nsb.",
    b"ccopy_reg\n_reconstructor\nq\x00(c__main__\nVocabulary\nq\x01c__builtin__\nobject\nq\x02Ntq\x03Rq\x04}q\x05(U\x08idx2wordq\x06}q\x07(K\x00U\x05<pad>q\x08K\x01U\x07<start>q\tK\x02U\x05<end>q\nK\x03U\x05<unk>q\x0bK\x04X\x05\x00\x00\x00caf\xc3\xa9q\x0cK\x05X\x03\x00\x00\x00\xe4\xb8\xadq\rK\x06U\x05na\xefveq\x0euU\x08word2idxq\x0f}q\x10(h\tK\x01h\nK\x02h\rK\x05h\x08K\x00h\x0eK\x06h\x0cK\x04h\x0bK\x03uU\x03idxq\x11K\x07ub.",
    b"\x80\x02c__main__\nVocabulary\nq\x00)\x81q\x01}q\x02(U\x08idx2wordq\x03}q\x04(K\x00U\x05<pad>q\x05K\x01U\x07<start>q\x06K\x02U\x05<end>q\x07K\x03U\x05<unk>q\x08K\x04X\x05\x00\x00\x00caf\xc3\xa9q\tK\x05X\x03\x00\x00\x00\xe4\xb8\xadq\nK\x06U\x05na\xefveq\x0buU\x08word2idxq\x0c}q\r(h\x06K\x01h\x07K\x02h\nK\x05h\x05K\x00h\x0bK\x06h\tK\x04h\x08K\x03uU\x03idxq\x0eK\x07ub.",
]
# And of {"opt": Namespace, "o": OrderedDict with an attribute, "none": None, "l": [1.5, -1]}, protocols 1 and 2.
NAME_2 = b"x" * 300
PYTHON_2_OPTIONS = [
    b"}q\x00(U\x03optq\x01ccopy_reg\n_reconstructor\nq\x02(cargparse\nNamespace\nq\x03c__builtin__\nobject\nq\x04Ntq\x05Rq\x06}q\x07(U\x03bigq\x08L1180591620717411303424L\nU\x01Kq\tK\x02U\x06marginq\nG?\xc9\x99\x99\x99\x99\x99\x9aU\x04flagq\x0bI01\nU\x04nameq\x0cT,\x01\x00\x00"
    + NAME_2
    + b"q\rubU\x04noneq\x0eNU\x01lq\x0f]q\x10(G?\xf8\x00\x00\x00\x00\x00\x00J\xff\xff\xff\xffeU\x01oq\x11ccollections\nOrderedDict\nq\x12(]q\x13(]q\x14(U\x01aq\x15K\x01e]q\x16(U\x01bq\x17(K\x01K\x02K\x03K\x04tq\x18eetq\x19Rq\x1a}q\x1bU\t_metadataq\x1ch\x12(]q\x1d]q\x1e(U\x01xq\x1fK\x01eatq Rq!sbu.",
    b"\x80\x02}q\x00(U\x03optq\x01cargparse\nNamespace\nq\x02)\x81q\x03}q\x04(U\x03bigq\x05\x8a\t\x00\x00\x00\x00\x00\x00\x00\x00@U\x01Kq\x06K\x02U\x06marginq\x07G?\xc9\x99\x99\x99\x99\x99\x9aU\x04flagq\x08\x88U\x04nameq\tT,\x01\x00\x00"
    + NAME_2
    + b"q\nubU\x04noneq\x0bNU\x01lq\x0c]q\r(G?\xf8\x00\x00\x00\x00\x00\x00J\xff\xff\xff\xffeU\x01oq\x0eccollections\nOrderedDict\nq\x0f]q\x10(]q\x11(U\x01aq\x12K\x01e]q\x13(U\x01bq\x14(K\x01K\x02K\x03K\x04tq\x15ee\x85q\x16Rq\x17}q\x18U\t_metadataq\x19h\x0f]q\x1a]q\x1b(U\x01xq\x1cK\x01ea\x85q\x1dRq\x1esbu.",
]


class Vocabulary:
    """In the authors' shape; pickled under the name that theirs has."""

    def __init__(self, ids):
        self.word2idx = ids
        self.idx2word = {index: word for word, index in ids.items()}
        self.idx = len(ids)


Vocabulary.__module__ = "__main__"
Vocabulary.__qualname__ = "Vocabulary"


@pytest.fixture(autouse=True)
def _main_has_the_class(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "Vocabulary", Vocabulary, raising=False)


class Attack:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def checkpoint(**more):
    weights = collections.OrderedDict(
        [
            ("matrix", torch.arange(6.0).reshape(2, 3)),
            ("turned", torch.arange(6.0).reshape(2, 3).T),
            ("number", torch.tensor(7)),
            ("nothing", torch.empty(0, 4)),
            ("half", torch.tensor([1.5, -2.0]).half()),
        ]
    )
    shared = torch.arange(10, dtype=torch.float64)
    weights["first"], weights["last"] = shared[:4], shared[6:]
    opt = argparse.Namespace(K=2, margin=0.2, name="f30k", flag=True, nothing=None)
    return {"epoch": 3, "model": [weights], "best_rsum": np.float64(123.5), "opt": opt, "Eiters": 77, **more}


def saved(path, value, *, legacy, protocol=2):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return path


def refused(function, path, message):
    with pytest.raises(DualmatchError, match=message) as error:
        function(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_checkpoint_comes_through(tmp_path, legacy, protocol):
    expected = checkpoint(raw=b"\x00\xff", pair=(1, "two"), long=2**70, sizes=[1, 2, 3, -4])
    found = read_torch_file(saved(tmp_path / "c.pth.tar", expected, legacy=legacy, protocol=protocol))
    assert list(found) == list(expected)
    for name, tensor in expected["model"][0].items():
        torch.testing.assert_close(found["model"][0][name], tensor, rtol=0, atol=0)
        assert found["model"][0][name].dtype == tensor.dtype
    assert found["opt"] == expected["opt"]
    assert found["best_rsum"] == 123.5
    assert type(found["best_rsum"]) is float
    for key in ("epoch", "raw", "pair", "long", "sizes"):
        assert found[key] == expected[key]


def test_module_prefix_and_containers(tmp_path):
    one = checkpoint(model={"module.fc.weight": torch.ones(2)})
    found = read_checkpoint(saved(tmp_path / "c.pth.tar", one, legacy=True))
    assert [list(state) for state in found.states] == [["fc.weight"]]
    assert (found.epoch, found.best_rsum, found.opt["K"]) == (3, 123.5, 2)


@pytest.mark.parametrize("lacking", ["model", "opt"])
def test_a_checkpoint_of_others(tmp_path, lacking):
    values = checkpoint()
    del values[lacking]
    refused(read_checkpoint, saved(tmp_path / "c.pth.tar", values, legacy=False), f"lacks {lacking}")


@pytest.mark.parametrize("raw", PYTHON_2_OPTIONS)
def test_python_2(tmp_path, raw):
    path = saved(tmp_path / "c.pth.tar", {}, legacy=True)
    path.write_bytes(path.read_bytes().replace(b"\x80\x02}q\x00.\x80\x02]q\x00.", raw + b"\x80\x02]q\x00."))
    found = read_torch_file(path)
    assert found["opt"] == argparse.Namespace(big=2**70, K=2, margin=0.2, flag=True, name=NAME_2.decode())
    assert found["o"] == {"a": 1, "b": (1, 2, 3, 4)}
    assert found["l"] == [1.5, -1]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_vocabulary_comes_through(tmp_path, protocol):
    ids = {word: index for index, word in enumerate(WORDS)}
    path = tmp_path / "vocab.pkl"
    path.write_bytes(pickle.dumps(Vocabulary(ids), protocol))
    assert read_vocabulary(path) == ids


@pytest.mark.parametrize("raw", PYTHON_2)
def test_a_vocabulary_of_python_2(tmp_path, raw):
    path = tmp_path / "vocab.pkl"
    path.write_bytes(raw)
    words = ["<pad>", "<start>", "<end>", "<unk>", "café", "中", "naïve"]
    assert read_vocabulary(path) == {word: index for index, word in enumerate(words)}


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"<pad>": 0}, "no Vocabulary"),
        (Vocabulary({"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "a": 5}), "0 to 4"),
        (Vocabulary({"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "a": 3}), "0 to 4"),
        (Vocabulary({"<start>": 0, "<pad>": 1, "<end>": 2, "<unk>": 3}), "begin with <pad>"),
        (Vocabulary({"<pad>": "0"}), "a number for each word"),
    ],
)
def test_no_vocabulary(tmp_path, vocabulary, message):
    path = tmp_path / "vocab.pkl"
    path.write_bytes(pickle.dumps(vocabulary))
    refused(read_vocabulary, path, message)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "posix.system"), (subprocess.call, r"\.call"), (builtins.eval, r"\.eval")]
)
def test_a_call_in_a_vocabulary(tmp_path, protocol, function, name):
    proof = tmp_path / "proof"
    argument = f"open({str(proof)!r}, 'w')" if function is builtins.eval else f"touch {proof}"
    path = tmp_path / "vocab.pkl"
    path.write_bytes(pickle.dumps(Vocabulary({"<pad>": Attack(function, argument)}), protocol))
    refused(read_vocabulary, path, name)
    assert not proof.exists()


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("place", ["opt", "model", "epoch", "best_rsum"])
def test_a_call_in_a_checkpoint(tmp_path, legacy, place):
    proof = tmp_path / "proof"
    path = saved(tmp_path / "c.pth.tar", checkpoint(**{place: Attack(os.system, f"touch {proof}")}), legacy=legacy)
    refused(read_torch_file, path, r"it names posix\.system")
    assert not proof.exists()


@pytest.mark.parametrize("position", range(4))
def test_a_call_in_the_pickles_around_a_checkpoint(tmp_path, position):
    """The old format holds four more pickles than the one with the object."""
    path, proof = tmp_path / "c.pth.tar", tmp_path / "proof"
    saved(path, {}, legacy=True)
    stream, parts = io.BytesIO(path.read_bytes()), []
    for _ in range(5):
        start = stream.tell()
        pickle.load(stream)
        parts.append(stream.getvalue()[start : stream.tell()])
    parts[[0, 1, 2, 4][position]] = pickle.dumps(Attack(os.system, f"touch {proof}"), 2)
    path.write_bytes(b"".join(parts))
    refused(read_torch_file, path, r"it names posix\.system")
    assert not proof.exists()


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    ("true", "swapped", "message"),
    [
        (b"argparse\nNamespace\n", b"builtins\ngetattr\n\n", r"it names builtins\.getattr"),
        (b"argparse\nNamespace\n", b"torch\nFloatStorage\n", r"only a type's name"),
        (b"collections\nOrderedDict\n", b"torch\nHalfStorage    \n", r"it names torch\.HalfStorage "),
        (b"torch._utils\n_rebuild_tensor_v2\n", b"torch._utils\n_rebuild_parameter\n", r"it names torch\._utils\._rebuild_parameter"),
        (b"torch\nFloatStorage\n", b"torch\nUnknownStor.\n", r"it names torch\.Unknown"),
    ],
)  # fmt: skip
def test_a_swapped_global(tmp_path, legacy, true, swapped, message):
    path = saved(tmp_path / "c.pth.tar", checkpoint(), legacy=legacy)
    if legacy:
        raw = path.read_bytes()
        assert true in raw
        path.write_bytes(raw.replace(true, swapped.rstrip(b"\n") + b"\n"))
    else:
        rewrite(path, lambda raw: raw.replace(true, swapped.rstrip(b"\n") + b"\n"))
    refused(read_torch_file, path, message)


def rewrite(path, change):
    """The zip archive with another data.pkl."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, change(raw) if name.endswith("data.pkl") else raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"cargparse\nNamespace\n}(X\x04\x00\x00\x00__eqK\x01ub.", "attributes to a Name"),
        (b"(S'touch proof'\nios\nsystem\n.", r"it names os\.system"),
        (b"(i__main__\nVocabulary\n.", "plain data does not need"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", r"it names os\.system"),
        (b"P0\n.", "instruction PERSID"),
        (b"K\x00Q.", "instruction BINPERSID"),
        (b"\x82\x01.", "instruction EXT1"),
        (b"\x8f.", "instruction EMPTY_SET"),
        (b"K\x01K\x02\x85R.", "a int where a Name belongs"),
        (b"}" + b"(" + b")" + b"\x85" * 5 + b"K\x01u.", "tuple as the key"),
        (b"\x8e" + b"\xff" * 8 + b"abc.", "damaged"),
        (b"X\xff\xff\xff\x7fabc.", "damaged"),
        (b"h\x07.", "damaged"),
        (b"R.", "damaged"),
        (b"t.", "damaged"),
        (b"\xfe.", "no pickle instruction"),
        (b"N", "cut off"),
        (b"", "empty"),
    ],
)
def test_other_instructions(tmp_path, raw, message):
    path = tmp_path / "vocab.pkl"
    path.write_bytes(raw.replace(b"argparse\nNamespace", b"__main__\nVocabulary"))
    refused(read_vocabulary, path, message)


class Claims(pickle.Pickler):
    """Writes tensors of one storage of any claimed length."""

    def __init__(self, file, length, size, stride):
        super().__init__(file, protocol=2)
        self.length, self.size, self.stride = length, size, stride

    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", self.length) if value is Ellipsis else None

    def value(self):
        hooks = collections.OrderedDict()
        return Attack(torch._utils._rebuild_tensor_v2, ..., 0, self.size, self.stride, False, hooks)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    ("length", "size", "stride", "message"),
    [
        (2_500_000_000, (2_500_000_000,), (1,), "claims a tensor of 10,000,000,000 bytes"),
        (2**62, (2,), (1,), "claims a tensor of"),
        (4, (50_000, 50_000), (0, 0), "larger than its storage of 4"),
        (4, (2, 2), (4, 1), "damaged"),
        (4, (2, 2, 1), (2, 1), "damaged"),
        (4, (-4,), (1,), "described in a way"),
        (-4, (4,), (1,), "described in a way"),
        (3, (3,), (1,), "cut off or of another length"),
    ],
)
def test_a_header_that_claims_too_much(tmp_path, legacy, length, size, stride, message):
    path = tmp_path / "c.pth.tar"
    honest = saved(path, {"x": torch.zeros(4)}, legacy=legacy)
    pickled = io.BytesIO()
    claims = Claims(pickled, length, size, stride)
    claims.dump({"x": claims.value()})
    if legacy:
        stream = io.BytesIO(honest.read_bytes())
        for _ in range(3):
            pickle.load(stream)
        tail = pickle.dumps(["0"], 2) + (4).to_bytes(8, "little") + bytes(16)
        path.write_bytes(stream.getvalue()[: stream.tell()] + pickled.getvalue() + tail)
    else:
        rewrite(path, lambda _: pickled.getvalue())
    refused(read_torch_file, path, message)


def test_a_compressed_archive(tmp_path):
    path = saved(tmp_path / "c.pth.tar", {"x": torch.zeros(1000)}, legacy=False)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    refused(read_torch_file, path, "compressed")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_truncated_file(tmp_path, legacy):
    path = saved(tmp_path / "c.pth.tar", checkpoint(), legacy=legacy)
    raw = path.read_bytes()
    for length in {*range(0, len(raw), 7), len(raw) - 1}:
        path.write_bytes(raw[:length])
        refused(read_torch_file, path, "cannot be read")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_with_any_byte_changed_is_read_or_refused(tmp_path, legacy):
    path = saved(tmp_path / "c.pth.tar", checkpoint(), legacy=legacy)
    raw, chance = path.read_bytes(), random.Random(0)
    for _ in range(400):
        changed = bytearray(raw)
        changed[chance.randrange(len(raw))] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            read_torch_file(path)
        except DualmatchError as error:
            assert "\n" not in str(error)  # noqa: PT017  (any other exception fails the test)


@pytest.mark.parametrize("raw", [b"PK\x03\x04 no archive", b"\x1f\x8b gzip", b"ustar", b"{}", b"\x80\x02}."])
def test_other_files(tmp_path, raw):
    path = tmp_path / "c.pth.tar"
    path.write_bytes(raw)
    refused(read_torch_file, path, "cannot be read")


def test_no_file(tmp_path):
    refused(read_torch_file, tmp_path / "c.pth.tar", "there is no checkpoint")
    refused(read_vocabulary, tmp_path / "v.pkl", "there is no vocabulary")
