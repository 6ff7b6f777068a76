"""Signature: a detached ed25519 signature of config.json, whose checksums cover every other file of a base.

It is raw, as `openssl pkeyutl -sign -rawin -inkey key.pem -in config.json -out config.json.sig` writes it, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattr.attributor.changes import FILE as CHANGES
from fastattr.core.errors import ArtifactDamagedError, InputError, MissingExtraError, MissingFileError
from fastattr.core.files import atomic_path

FILE = "config.json.sig"


def sign(folder: Path, key: Path) -> Path:
    """Sign an attributor without changes since its base with a private key (PEM); returns the signature's file."""
    signature = _ed25519(key.read_bytes(), private=True).sign(_signed_part(folder))
    with atomic_path(folder / FILE) as temporary:
        temporary.write_bytes(signature)
    return folder / FILE


def require_signature(folder: Path, trusted_keys: Sequence[str]) -> None:
    """Raise an error unless one of these public keys (PEM) has signed config.json, and nothing has changed since its base."""
    keys, data = [_ed25519(key.encode()) for key in trusted_keys], _signed_part(folder)
    if not (folder / FILE).is_file():
        raise MissingFileError(f"{folder} has no {FILE}: nobody has signed it, so it is not read; see `fastattr sign`.")
    if not any(_is_of(key, (folder / FILE).read_bytes(), data) for key in keys):
        raise ArtifactDamagedError(
            f"{folder / FILE} is no signature of config.json by a trusted key; do not use the attributor."
        )


def _is_of(key: Any, signature: bytes, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _signed_part(folder: Path) -> bytes:
    """The bytes of config.json, if there is nothing that they do not cover."""
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"{folder} has no config.json; it is no attributor, or an incomplete one.")
    if (folder / CHANGES).exists():
        raise InputError(f"{folder} has been changed, which a signature does not cover: save it to a new folder and sign that.")
    return (folder / "config.json").read_bytes()


def _ed25519(key: bytes, *, private: bool = False) -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as error:
        raise MissingExtraError(f"signatures need cryptography ({error}); run: pip install 'fastattr[sign]'") from error
    try:
        found = load_pem_private_key(key, None) if private else load_pem_public_key(key)
    except (ValueError, TypeError) as error:
        raise InputError(f"a key can't be read ({error}); give an ed25519 key in PEM, without a password.") from error
    if not isinstance(found, Ed25519PrivateKey | Ed25519PublicKey):
        raise InputError(f"a key is a {type(found).__name__}; give an ed25519 key (`openssl genpkey -algorithm ed25519`).")
    return found
