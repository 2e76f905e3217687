"""The SSH host key of a board, made before its first boot, so that the controller knows it when it first answers.

The private half stands in the rendered files only: whoever has them can pass for the board.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from testbed.errors import UsageError

FILE = "ssh_host_ed25519_key"


@dataclass(frozen=True)
class HostKey:
    """An ed25519 key pair in OpenSSH's forms."""

    private: str = field(repr=False)
    public: str  # "ssh-ed25519 AAAA…"

    @classmethod
    def made(cls) -> HostKey:
        key = Ed25519PrivateKey.generate()
        return cls(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode(), _public(key))

    @classmethod
    def read(cls, path: Path) -> HostKey:
        """From a file of the private half, kept letter by letter (OpenSSH's form has a random number in it).

        Raises UsageError.
        """
        try:
            text = path.read_text(encoding="ascii")
            key = load_ssh_private_key(text.encode(), None)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise UsageError(
                f"{path} is damaged: expected a private ed25519 key without a passphrase; put it back, or remove the "
                "file or name a new folder: the board then gets a new host key"
            )
        return cls(text, _public(key))


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
