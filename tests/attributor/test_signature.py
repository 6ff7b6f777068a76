"""Signed attributors: who names trusted keys reads nothing that these keys have not signed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastattr import ArtifactDamagedError, FastAttributor, InputError, MissingFileError
from fastattr.attributor import folder as folders
from fastattr.cli.main import main
from tests.made import write_attributor

pytest.importorskip("cryptography", reason="pip install 'fastattr[sign]'")


def key_pair(path: Path) -> tuple[Path, str]:
    """A private key's file, and its public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.fixture
def signed(tmp_path):
    folder, (key, public) = write_attributor(tmp_path / "a"), key_pair(tmp_path / "key.pem")
    assert main(["sign", str(folder), "--key", str(key)]) == 0
    return folder, public


def test_a_signed_attributor_loads_with_its_key_among_others(signed, tmp_path):
    """A copy is the same attributor; a saved one that lost its signature could not be passed on."""
    folder, public = signed
    other = key_pair(tmp_path / "other.pem")[1]
    attributor = FastAttributor.from_pretrained(folder, trusted_keys=[other, public])
    attributor.save_pretrained(tmp_path / "copy")
    assert len(FastAttributor.from_pretrained(tmp_path / "copy", trusted_keys=[public])) == len(attributor)


@pytest.mark.parametrize("what", ["other key", "no key", "config", "no signature", "signature", "changed", "rsa"])
def test_what_is_not_signed_by_a_trusted_key_is_not_read(signed, tmp_path, monkeypatch, what):
    """A stranger can make every checksum of config.json, but not the signature; before it holds, no byte is parsed."""
    folder, public = signed
    keys, error = [public], ArtifactDamagedError
    if what == "other key":
        keys = [key_pair(tmp_path / "other.pem")[1]]
    elif what == "no key":
        keys = []
    elif what == "config":
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    elif what == "no signature":
        (folder / "config.json.sig").unlink()
        error = MissingFileError
    elif what == "signature":
        (folder / "config.json.sig").write_bytes(b"short")
    elif what == "changed":
        FastAttributor.from_pretrained(folder).remove(["base-1"])
        error = InputError
    else:
        keys, error = ["-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"], InputError
    monkeypatch.setattr(folders, "read_config", lambda _: pytest.fail("it was read"))
    with pytest.raises(error):
        FastAttributor.from_pretrained(folder, trusted_keys=keys)


def test_a_new_base_has_no_old_signature(signed, tmp_path):
    """The signature of another config would say that the attributor is forged."""
    folder, public = signed
    attributor = FastAttributor.from_pretrained(folder)
    attributor.remove(["base-1"])
    attributor.save_pretrained(tmp_path / "saved")
    attributor.compact()
    assert not (folder / "config.json.sig").exists()
    assert not (tmp_path / "saved" / "config.json.sig").exists()
    assert main(["sign", str(tmp_path / "saved"), "--key", str(tmp_path / "key.pem")]) == 0
    assert len(FastAttributor.from_pretrained(tmp_path / "saved", trusted_keys=[public])) == len(attributor)


def test_a_changed_folder_is_not_signed(signed, tmp_path, capsys):
    """Its changes are in no checksum: the signature would not cover what it answers."""
    folder, _ = signed
    FastAttributor.from_pretrained(folder).remove(["base-1"])
    assert main(["sign", str(folder), "--key", str(tmp_path / "key.pem")]) == 2
    assert "save it to a new folder" in capsys.readouterr().err
    shutil.rmtree(folder)
