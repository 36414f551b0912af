"""Signatures of bundles: Ed25519 over the bytes of the manifest, whose hashes stand for all else.

`manifest.sig` holds the 64 bytes of the signature and no more, so that `openssl pkeyutl` reads and writes it too. Keys
are PEM files as `openssl genpkey -algorithm ed25519` makes them; the password of a private one, if it has any, comes
from the environment. The package `cryptography` does the work, and is loaded by those who sign or verify.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calibrators.errors import BundleError, RecipeError

__all__ = ["PASSWORD", "SIGNATURE", "Signer", "Verifier", "signer", "verifier"]

SIGNATURE = "manifest.sig"
PASSWORD = "DFQ_DEPLOY_KEY_PASSWORD"
"""The variable that holds the password of a private key."""

Signer = Callable[[bytes], bytes]
"""Gives the signature of some bytes."""
Verifier = Callable[[bytes, bytes | None, str], None]
"""Holds bytes against their signature, if there is one, and raises BundleError in the name of what they are of."""


def signer(key: str | Path) -> Signer:
    """What signs with the private key in the PEM file `key`.

    Raises:
        RecipeError: The file is no Ed25519 private key, its password is missing or wrong, or `cryptography` is missing.
    """
    sign: Signer = _key(key, "private").sign
    return sign


def verifier(key: str | Path) -> Verifier:
    """What verifies signatures by the public key in the PEM file `key`.

    Raises:
        RecipeError: The file is no Ed25519 public key, or `cryptography` is missing.
    """
    made = _key(key, "public")
    wrong = importlib.import_module("cryptography.exceptions").InvalidSignature

    def verify(content: bytes, signature: bytes | None, whose: str) -> None:
        if signature is None:
            raise BundleError(
                what=f"`{whose}` is not signed.",
                why=f"it holds no {SIGNATURE}, and --verify asks for one.",
                fix="get it from who made it, or sign it with --sign if you did.",
            )
        try:
            made.verify(signature, content)
        except wrong as cause:
            raise BundleError(
                what=f"the signature of `{whose}` is wrong.",
                why=f"its manifest was altered after it was signed, or was signed with another key than `{key}` is of.",
                fix="do not run it; get it again from who made it.",
            ) from cause

    return verify


def _key(path: str | Path, kind: str) -> Any:
    """The Ed25519 key in a PEM file, private or public."""
    try:
        serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
        ed25519 = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
    except ImportError as cause:
        raise RecipeError(
            what="signatures need the package `cryptography`, which is not installed.",
            why="--sign and --verify are an extra.",
            fix="pip install 'dfq-deploy[sign]'.",
        ) from cause
    try:
        content = Path(path).read_bytes()
        password = os.environ[PASSWORD].encode() if PASSWORD in os.environ and b"ENCRYPTED" in content else None
        if kind == "private":
            key = serialization.load_pem_private_key(content, password)
        else:
            key = serialization.load_pem_public_key(content)
        if not isinstance(key, getattr(ed25519, f"Ed25519{kind.capitalize()}Key")):
            message = "it is a key of another kind"
            raise ValueError(message)
    except Exception as cause:  # OpenSSL's errors, of many classes
        raise RecipeError(
            what=f"`{path}` cannot be read as an Ed25519 {kind} key.",
            why=f"{cause}.",
            fix=_REMEDY[kind],
        ) from cause
    return key


_REMEDY = {
    "private": f"openssl genpkey -algorithm ed25519 -out key.pem makes one; {PASSWORD} holds its password, if any.",
    "public": "openssl pkey -in key.pem -pubout -out key.pub.pem takes it from the private one.",
}
