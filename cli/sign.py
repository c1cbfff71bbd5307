"""`dualmatch sign`."""

from pathlib import Path

import click

from .common import existing, json_option, print_json


@click.command("sign")
@click.argument("bundle", type=existing, required=False)
@click.option("--key", required=True, type=existing, metavar="KEY.pem", help="The Ed25519 private key.")
@click.option(
    "--new-key", is_flag=True, help="Make KEY.pem and KEY.pub.pem first; neither may exist. BUNDLE can be left out."
)
@json_option
def command(bundle: Path | None, key: Path, *, new_key: bool, as_json: bool) -> None:
    """Sign BUNDLE's manifest, and with it the hash of every file: BUNDLE/manifest.sig.

    `--require-signature KEY.pub.pem` then opens no bundle that is not signed by this key. What changes the manifest (`dualmatch
    compile`) makes the signature stale: sign again. $DUALMATCH_KEY_PASSPHRASE encrypts a new key, and opens an encrypted one.
    """
    if bundle is None and not new_key:
        raise click.UsageError("give the BUNDLE to sign, or --new-key to make a key.")
    from dualmatch.runtime.bundle import load_bundle, sign_bundle
    from dualmatch.runtime.signature import SIGNATURE, new_key_pair

    result: dict[str, str] = {}
    if new_key and bundle is not None:
        load_bundle(bundle, require_signature=False)  # no key is made for a bundle that does not open
    if new_key:
        result = {"private_key": str(key), "public_key": str(new_key_pair(key))}
    if bundle is not None:
        result |= {"signed_by": sign_bundle(bundle, key), "signature": str(bundle / SIGNATURE)}
    if as_json:
        print_json(result)
        return
    if new_key:
        click.echo(f"{key}: private key, keep it secret\n{result['public_key']}: public key, for those who check")
    if bundle is not None:
        click.echo(f"{result['signature']}: signed by {result['signed_by']}")
