"""Signed bundles: every kind of tampering is refused with a sentence, and what was signed opens."""

import base64
import json
import os
import re
import shutil
import stat
from pathlib import Path

import click
import pytest

from dualmatch.cli.main import cli
from dualmatch.runtime import ImageEncoder, load_bundle
from dualmatch.runtime.bundle import MANIFEST, file_entry, sign_bundle
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.signature import PASSPHRASE, SIGNATURE, VARIABLE, new_key_pair

from .demo_fixture import dualmatch, edit_manifest, one_sentence, seal

pytest.importorskip("cryptography")

FILES = ["image_encoder.onnx", "text_encoder.onnx", "tokenizer.json", "parity.safetensors", "parity.json", "README.md"]


@pytest.fixture(autouse=True)
def no_requirement(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(PASSPHRASE, raising=False)


@pytest.fixture
def key(tmp_path):
    new_key_pair(tmp_path / "key.pem")
    return tmp_path / "key.pem"


@pytest.fixture
def public(key):
    return key.with_name("key.pub.pem")


@pytest.fixture
def bundle(small_bundle, key, tmp_path):
    """A signed copy to damage."""
    copied = shutil.copytree(small_bundle, tmp_path / "bundle")
    sign_bundle(copied, key)
    return copied


def refusal(bundle, public):
    with pytest.raises(DualmatchError) as found:
        load_bundle(bundle, require_signature=public)
    text = str(found.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def edit_signature(bundle, **changes):
    path = bundle / SIGNATURE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_signed_bundle_opens_and_says_who_signed_it(bundle, public, small_bundle):
    opened = load_bundle(bundle, require_signature=public)
    assert opened.signed_by == json.loads((bundle / SIGNATURE).read_text())["key"]
    assert opened.hash == load_bundle(small_bundle).hash, "galleries stay valid"
    assert load_bundle(bundle).signed_by is None, "nobody asked, nothing was checked"


def test_the_signature_is_plain_ed25519_over_the_manifests_bytes(bundle, public):
    """So that other tools can check it."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    signature = base64.b64decode(json.loads((bundle / SIGNATURE).read_text())["signature"])
    load_pem_public_key(public.read_bytes()).verify(signature, (bundle / MANIFEST).read_bytes())


def test_a_bundle_that_is_not_signed(bundle, public):
    (bundle / SIGNATURE).unlink()
    assert "is not signed" in refusal(bundle, public)
    (bundle / SIGNATURE).symlink_to(public)
    assert "is not signed" in refusal(bundle, public)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_in_a_file(name, bundle, public):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    assert "SHA-256" in refusal(bundle, public)


@pytest.mark.parametrize("name", FILES)
def test_a_file_changed_together_with_its_hash(name, bundle, public):
    """What the hashes alone cannot see."""
    padding = b"\x32\0" if name.endswith(".onnx") else b" "
    (bundle / name).write_bytes((bundle / name).read_bytes() + padding)
    seal(bundle)
    load_bundle(bundle)
    assert "stale" in refusal(bundle, public)


def test_one_flipped_bit_anywhere_in_the_manifest(bundle, public):
    good = (bundle / MANIFEST).read_bytes()
    for position in range(0, len(good), 97):
        data = bytearray(good)
        data[position] ^= 1
        (bundle / MANIFEST).write_bytes(data)
        assert "stale" in refusal(bundle, public)


def test_another_bundles_manifest_and_signature(bundle, public, small_bundle, key, tmp_path):
    """Both are genuine, but the files are not theirs."""
    other = shutil.copytree(small_bundle, tmp_path / "other")
    edit_manifest(other, lambda values: values["files"]["README.md"].update(sha256="0" * 64))
    (other / "README.md").unlink()
    shutil.copy(other / MANIFEST, bundle / MANIFEST)
    assert "stale" in refusal(bundle, public)


def test_an_added_file(bundle, public):
    (bundle / "extra.bin").write_bytes(b"x")
    load_bundle(bundle)
    assert "holds extra.bin" in refusal(bundle, public)
    (bundle / "extra.bin").unlink()
    (bundle / "engines").mkdir(exist_ok=True)
    (bundle / "engines" / "a.engine").symlink_to(bundle / "README.md")
    assert "holds engines/a.engine" in refusal(bundle, public)
    (bundle / "engines" / "a.engine").unlink()
    (bundle / ".gitattributes").write_text("*.onnx filter=lfs")
    load_bundle(bundle, require_signature=public)


def test_a_removed_file(bundle, public):
    (bundle / "README.md").unlink()
    assert "lacks README.md" in refusal(bundle, public)


def test_compiling_makes_the_signature_stale_until_it_is_signed_again(bundle, public, key):
    (bundle / "engines").mkdir(exist_ok=True)
    (bundle / "engines" / "image.engine").write_bytes(b"plan")
    entry = vars(file_entry(bundle / "engines" / "image.engine"))
    edit_manifest(bundle, lambda values: values["files"].update({"engines/image.engine": entry}))
    text = refusal(bundle, public)
    assert "stale" in text
    assert "dualmatch compile" in text
    sign_bundle(bundle, key)
    load_bundle(bundle, require_signature=public)


def test_another_key(bundle, key, public, tmp_path):
    other = new_key_pair(tmp_path / "other.pem")
    assert "is signed by the key" in refusal(bundle, other)
    both = tmp_path / "both.pem"
    both.write_bytes(other.read_bytes() + public.read_bytes())
    assert (
        load_bundle(bundle, require_signature=both).signed_by == load_bundle(bundle, require_signature=public).signed_by
    )
    # Who signs with another key may claim the right one's name.
    claimed = json.loads((bundle / SIGNATURE).read_text())["key"]
    sign_bundle(bundle, tmp_path / "other.pem")
    edit_signature(bundle, key=claimed)
    assert "not valid" in refusal(bundle, public)


def test_a_signature_that_was_damaged(bundle, public):
    signature = base64.b64decode(json.loads((bundle / SIGNATURE).read_text())["signature"])
    for position in (0, 31, 32, 63):
        flipped = bytearray(signature)
        flipped[position] ^= 1
        edit_signature(bundle, signature=base64.b64encode(flipped).decode())
        assert "not valid" in refusal(bundle, public)
    for data in (b"", signature[:-1], signature + b"\0"):
        edit_signature(bundle, signature=base64.b64encode(data).decode())
        assert f"of {len(data)} bytes" in refusal(bundle, public)
    for value in ("not base64!", None, 5, ["x"]):
        edit_signature(bundle, signature=value)
        assert "of 0 bytes" in refusal(bundle, public)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not a signature"),
        ("[]", "not a signature"),
        ("{}", "not a signature"),
        ('{"format": "dualmatch-signature", "version": 2}', "version 2"),
        ('{"format": "dualmatch-signature", "version": 1, "algorithm": "none"}', "algorithm none"),
        ('{"format": "x", "format": "dualmatch-signature"}', "stands there 2 times"),
        ("[" * 50_000, "not a signature"),
        (" " * 100_000, "not a signature"),
    ],
)
def test_a_signature_file_that_is_none(text, sentence, bundle, public):
    (bundle / SIGNATURE).write_text(text)
    assert sentence in refusal(bundle, public)


def other_keys():
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519

    return {
        "rsa": rsa.generate_private_key(65537, 2048),
        "ec": ec.generate_private_key(ec.SECP256R1()),
        "ed448": ed448.Ed448PrivateKey.generate(),
        "x25519": x25519.X25519PrivateKey.generate(),
    }


def test_keys_of_another_kind(bundle, public, tmp_path):
    from cryptography.hazmat.primitives import serialization as s

    for name, key in other_keys().items():
        private, shared = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub.pem"
        private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
        shared.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
        assert "Ed25519" in refusal(bundle, shared)
        with pytest.raises(DualmatchError, match="signed by Ed25519 keys"):
            sign_bundle(bundle, private)


def test_what_is_no_key(bundle, key, public, tmp_path):
    garbage = tmp_path / "garbage.pem"
    for data in (b"", b"\0" * 50, b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"x" * 100_000):
        garbage.write_bytes(data)
        assert "garbage.pem" in refusal(bundle, garbage)
        with pytest.raises(DualmatchError, match=r"garbage\.pem"):
            sign_bundle(bundle, garbage)
    assert "there is no public key" in refusal(bundle, tmp_path / "nowhere.pem")
    assert "there is no public key" in refusal(bundle, tmp_path)
    assert "holds a private key" in refusal(bundle, key)
    with pytest.raises(DualmatchError, match="holds a public key"):
        sign_bundle(bundle, public)
    with pytest.raises(DualmatchError, match="there is no private key"):
        sign_bundle(bundle, tmp_path / "nowhere.pem")


def test_a_new_key_is_its_owners_alone_and_overwrites_nothing(tmp_path):
    public = new_key_pair(tmp_path / "k.pem")
    assert public == tmp_path / "k.pub.pem"
    assert stat.S_IMODE((tmp_path / "k.pem").stat().st_mode) == 0o600
    before = (tmp_path / "k.pem").read_bytes()
    with pytest.raises(DualmatchError, match="exists already"):
        new_key_pair(tmp_path / "k.pem")
    (tmp_path / "k.pem").unlink()
    with pytest.raises(DualmatchError, match="exists already"):
        new_key_pair(tmp_path / "k.pem")
    assert not (tmp_path / "k.pem").exists()
    public.unlink()
    new_key_pair(tmp_path / "k.pem")
    assert (tmp_path / "k.pem").read_bytes() != before


def test_an_encrypted_key(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv(PASSPHRASE, "secret")
    public = new_key_pair(tmp_path / "e.pem")
    assert b"ENCRYPTED" in (tmp_path / "e.pem").read_bytes()
    sign_bundle(bundle, tmp_path / "e.pem")
    load_bundle(bundle, require_signature=public)
    monkeypatch.setenv(PASSPHRASE, "other")
    with pytest.raises(DualmatchError, match="passphrase"):
        sign_bundle(bundle, tmp_path / "e.pem")
    monkeypatch.delenv(PASSPHRASE)
    with pytest.raises(DualmatchError, match="is encrypted"):
        sign_bundle(bundle, tmp_path / "e.pem")


def test_a_damaged_bundle_is_not_signed(bundle, key):
    before = (bundle / SIGNATURE).read_bytes()
    (bundle / "extra.bin").write_bytes(b"x")
    with pytest.raises(DualmatchError, match=r"holds extra\.bin"):
        sign_bundle(bundle, key)
    (bundle / "extra.bin").unlink()
    (bundle / "README.md").write_text("other")
    with pytest.raises(DualmatchError, match=r"README\.md"):
        sign_bundle(bundle, key)
    assert (bundle / SIGNATURE).read_bytes() == before


def test_the_variable_reaches_every_way_in(bundle, public, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(public))
    assert load_bundle(bundle).signed_by
    (bundle / SIGNATURE).unlink()
    with pytest.raises(DualmatchError, match="is not signed"):
        ImageEncoder(bundle)
    assert load_bundle(bundle, require_signature=False).signed_by is None
    monkeypatch.setenv(VARIABLE, "")
    assert load_bundle(bundle).signed_by is None


COMMANDS = [
    "runtime encode-gallery {bundle} {photos} --out {out}",
    "runtime encode-captions {bundle} {captions} --out {out}",
    "runtime search {gallery} --text ball --bundle {bundle}",
    "runtime evaluate {bundle} --data {data}",
    "runtime evaluate {good} --data {data} --ensemble {bundle}",
    "runtime verify {bundle} --data {data}",
    "bench latency {bundle} --budget 0.05 --batch-sizes 1",
    "compile {bundle} --flavour tensorrt-rtx",
    "triton {bundle} --out {out}",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_opens_a_bundle_can_require_a_signature(
    command, bundle, public, small_bundle, small_run, key, demo, tmp_path
):
    good = shutil.copytree(small_bundle, tmp_path / "good")
    sign_bundle(good, key)
    (bundle / SIGNATURE).unlink()
    (tmp_path / "captions.txt").write_text("a ball\n")
    words = command.format(
        bundle=bundle, good=good, photos=small_run.data / "images", captions=tmp_path / "captions.txt", data=small_run.data,
        out=tmp_path / "out", gallery=demo.gallery,
    ).split()  # fmt: skip
    done = dualmatch(*words, "--require-signature", public)
    assert done.code == 1
    assert one_sentence(done.err)
    assert "is not signed" in done.err
    assert not (tmp_path / "out").exists()
    assert VARIABLE not in os.environ, "the option is this command's alone"


def test_signing_and_requiring_from_the_command_line(small_bundle, small_run, tmp_path):
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    key, public = tmp_path / "k.pem", tmp_path / "k.pub.pem"
    done = dualmatch("sign", bundle, "--key", key, "--new-key", "--json")
    assert done.code == 0, done.err
    assert done.json["public_key"] == str(public)
    photos = small_run.data / "images"
    done = dualmatch(
        "runtime", "encode-gallery", bundle, photos, "--out", tmp_path / "g", "--require-signature", public
    )
    assert done.code == 0, done.err
    done = dualmatch("runtime", "search", tmp_path / "g", "--text", "a ball", "--require-signature", public)
    assert done.code == 0, done.err
    for words, sentence in (
        (("sign", bundle, "--key", tmp_path / "none.pem"), "there is no private key"),
        (("sign", bundle, "--key", key, "--new-key"), "exists already"),
        (("sign", small_run.folder, "--key", tmp_path / "n.pem", "--new-key"), "is a training run, not a bundle"),
        (("sign", tmp_path / "g", "--key", key), "is a gallery, not a bundle"),
    ):
        done = dualmatch(*words)
        assert done.code == 1
        assert one_sentence(done.err)
        assert sentence in done.err
    assert not (tmp_path / "n.pem").exists()
    assert dualmatch("sign", "--key", key).code == 2
    assert dualmatch("sign", "--key", tmp_path / "only.pem", "--new-key").code == 0


def test_without_cryptography_a_required_signature_is_a_refusal_and_not_a_pass(bundle, public, monkeypatch):
    import sys

    for name in [one for one in sys.modules if one.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert "dualmatch[sign]" in refusal(bundle, public)


def test_the_documentation_names_every_command_that_takes_a_key():
    takers = set()

    def walk(group):
        for name in group.list_commands(None):
            command = group.get_command(None, name)
            if isinstance(command, click.Group):
                walk(command)
            elif any("--require-signature" in option.opts for option in command.params):
                takers.add(name)

    walk(cli)
    text = (Path(__file__).parents[1] / "docs" / "integrity.md").read_text()
    (told,) = re.findall(r"`--require-signature` is an option of (.*?) For everything", text, re.DOTALL)
    assert {words.split()[-1] for words in re.findall(r"`([a-z -]+)`", told) if not words.startswith("-")} == takers
