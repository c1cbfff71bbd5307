"""Signatures of a bundle's manifest, Ed25519 (RFC 8032) by the `cryptography` package: who vouches for every hash in it.

BUNDLE/manifest.sig is a small JSON file. Its `signature` (base64) is over the bytes of manifest.json as they stand, so any Ed25519
tool can check it; `manifest_sha256` and `key` only serve to say what is wrong when it does not fit.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any, Literal

from .errors import DualmatchError
from .files import sha256_of_bytes, strict_json, write_atomically

SIGNATURE = "manifest.sig"
FORMAT, VERSION = "dualmatch-signature", 1
VARIABLE = "DUALMATCH_REQUIRE_SIGNATURE"
PASSPHRASE = "DUALMATCH_KEY_PASSPHRASE"  # noqa: S105  (a variable's name)
MAX_BYTES = 64 * 2**10

Requirement = str | Path | Literal[False] | None
"""A file of public keys; None: the one that $DUALMATCH_REQUIRE_SIGNATURE names, if any; False: no signature is needed."""


def required_keys(requirement: Requirement) -> Path | None:
    """The file of public keys that a bundle must be signed by one of, or None where it need not be signed."""
    if requirement is False:
        return None
    given = requirement if requirement is not None else os.environ.get(VARIABLE) or None
    return None if given is None else Path(given)


def new_key_pair(path: Path) -> Path:
    """Make a key pair: the private key at `path` (readable by its owner only), the public one beside it; returns the latter.

    With $DUALMATCH_KEY_PASSPHRASE set, the private key is encrypted by it.

    Raises:
        DualmatchError: one of the two files exists, or `cryptography` is not installed.
    """
    _, ed25519, serialization = _cryptography()
    public = path.with_name(f"{path.stem}.pub{path.suffix or '.pem'}")
    for one in (path, public):
        if one.exists() or one.is_symlink():
            raise DualmatchError(f"the key {one} exists already; it is not overwritten, give another path.")
    key = ed25519.Ed25519PrivateKey.generate()
    secret = os.environ.get(PASSPHRASE, "").encode()
    protection = serialization.BestAvailableEncryption(secret) if secret else serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    # Created with its final mode: a key must not be readable by others even for a moment.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    write_atomically(public, key.public_key().public_bytes(serialization.Encoding.PEM, spki))
    return public


def sign_manifest(manifest: bytes, key_path: Path) -> tuple[str, str]:
    """Sign a manifest's bytes.

    Returns:
        The text of `manifest.sig`, and the key's fingerprint.

    Raises:
        DualmatchError: the key cannot be read or is no Ed25519 private key, or `cryptography` is not installed.
    """
    key = _private_key(key_path)
    fingerprint = _fingerprint(key.public_key())
    content = {
        "format": FORMAT,
        "version": VERSION,
        "algorithm": "ed25519",
        "key": fingerprint,
        "manifest_sha256": sha256_of_bytes(manifest),
        "signature": base64.b64encode(key.sign(manifest)).decode(),
    }
    return json.dumps(content, indent=2) + "\n", fingerprint


def check_signature(manifest: bytes, bundle: Path, keys_path: Path) -> str:
    """Refuse a manifest that none of the given keys has signed; returns the fingerprint of the one that has.

    Args:
        manifest: the very bytes that will be parsed.
        bundle: the folder that holds `manifest.sig`.
        keys_path: a PEM file with one or more Ed25519 public keys.

    Raises:
        DualmatchError: not signed, signed by another key, signed before the manifest changed, or a file that cannot be read.
    """
    public_keys = _public_keys(keys_path)
    path = bundle / SIGNATURE
    if path.is_symlink() or not path.is_file():
        raise DualmatchError(
            f"the bundle {bundle} is not signed, and a signature by {keys_path} is required; "
            f"whoever made it can sign it: `dualmatch sign {bundle} --key KEY.pem`."
        )
    content = _content(path)
    signature = _signature(content, path)
    exception, *_ = _cryptography()
    for key in public_keys:
        try:
            key.verify(signature, manifest)
        except exception:
            continue
        return _fingerprint(key)
    if content.get("manifest_sha256") != sha256_of_bytes(manifest):
        raise DualmatchError(
            f"the signature of {bundle} is stale: manifest.json has changed since it was signed. If that was `dualmatch compile` "
            f"adding an engine, sign it again (`dualmatch sign {bundle} --key KEY.pem`); if nobody should have changed it, do not use it."
        )
    known = {_fingerprint(key) for key in public_keys}
    if content.get("key") not in known:
        raise DualmatchError(
            f"the bundle {bundle} is signed by the key {str(content.get('key'))[:80]}, not by {keys_path} ({', '.join(sorted(known))}); "
            "it is refused."
        )
    raise DualmatchError(
        f"the signature in {path} is not valid for {keys_path}: it was damaged or forged; it is refused."
    )


def _content(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        content = strict_json(data) if len(data) <= MAX_BYTES else None
    except ValueError as error:
        raise DualmatchError(f"{path} is not a signature ({error}); sign the bundle again.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DualmatchError(f"{path} is not a signature of a dualmatch bundle; sign the bundle again.")
    if content.get("version") != VERSION or content.get("algorithm") != "ed25519":
        raise DualmatchError(
            f"{path} has version {str(content.get('version'))[:20]} and algorithm {str(content.get('algorithm'))[:40]}; "
            f"this dualmatch reads version {VERSION} of ed25519."
        )
    return content


def _signature(content: dict[str, Any], path: Path) -> bytes:
    try:
        signature = base64.b64decode(content["signature"], validate=True)
    except (KeyError, TypeError, ValueError):
        signature = b""
    if len(signature) != 64:
        raise DualmatchError(
            f"{path} holds a signature of {len(signature)} bytes, Ed25519 has 64; it was cut or damaged, sign the bundle again."
        )
    return signature


def _private_key(path: Path) -> Any:
    _, ed25519, serialization = _cryptography()
    data = _read_pem(path, "private key")
    secret = os.environ.get(PASSPHRASE, "").encode() or None
    if b"PUBLIC KEY-----" in data:
        raise DualmatchError(f"{path} holds a public key; signing takes the private one.")
    if b"OPENSSH PRIVATE KEY" in data:
        raise DualmatchError(
            f"{path} is a key of OpenSSH; signing takes a PEM key, `dualmatch sign --new-key` makes one."
        )
    if secret is not None and b"ENCRYPTED" not in data:
        secret = None  # the variable may be meant for another key; this one needs none
    try:
        key = serialization.load_pem_private_key(data, secret)
    except TypeError:
        raise DualmatchError(f"the key {path} is encrypted; put its passphrase into ${PASSPHRASE}.") from None
    except ValueError:
        hint = f", or the passphrase in ${PASSPHRASE} is wrong" if b"ENCRYPTED" in data else ""
        raise DualmatchError(f"{path} is not a private key in PEM form{hint}.") from None
    except Exception as error:  # noqa: BLE001  (the library has its own exception for algorithms that it does not know)
        raise DualmatchError(f"the key {path} cannot be read: {error}.") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise DualmatchError(f"the key {path} is of the kind {_kind(key)}; bundles are signed by Ed25519 keys.")
    return key


def _public_keys(path: Path) -> list[Any]:
    _, ed25519, serialization = _cryptography()
    data = _read_pem(path, "public key")
    if b"PRIVATE KEY-----" in data:
        raise DualmatchError(
            f"{path} holds a private key; --require-signature takes the public one, and keep this file secret."
        )
    end = b"-----END PUBLIC KEY-----"
    *blocks, _ = data.split(end)
    keys = []
    for block in blocks:
        try:
            key = serialization.load_pem_public_key(block.strip() + b"\n" + end + b"\n")
        except Exception as error:  # noqa: BLE001  (the library has its own exception for algorithms that it does not know)
            raise DualmatchError(f"{path} is not a public key in PEM form: {error}.") from None
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise DualmatchError(f"the key {path} is of the kind {_kind(key)}; bundles are signed by Ed25519 keys.")
        keys.append(key)
    if not keys:
        raise DualmatchError(f"{path} is not a public key in PEM form.")
    return keys


def _read_pem(path: Path, what: str) -> bytes:
    if not path.is_file():
        raise DualmatchError(f"there is no {what} {path}; `dualmatch sign --new-key --key KEY.pem` makes a pair.")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DualmatchError(f"{path} is larger than {MAX_BYTES} bytes; it cannot be a key.")
    return data


def _fingerprint(public_key: Any) -> str:
    """SHA-256 of the raw public key, its first 16 bytes: enough to tell keys apart, never what decides."""
    return f"ed25519:{sha256_of_bytes(public_key.public_bytes_raw())[:32]}"


def _kind(key: Any) -> str:
    return type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey").lstrip("_")


def _cryptography() -> tuple[Any, Any, Any]:
    """(InvalidSignature, the ed25519 module, the serialization module)."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise DualmatchError(
            "signatures need the package cryptography, which is not installed: pip install 'dualmatch[sign]'."
        ) from None
    return InvalidSignature, ed25519, serialization
