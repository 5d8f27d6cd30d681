"""Published weights: files in torch.hub's folder whose SHA-256 is known, read without running code.

A file is a dict of tensors, written by safetensors or by `torch.save`; the latter is a pickle, of
which only tensors and plain values are read.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from app.runtime.errors import UserError
from app.runtime.lock import download_lock

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # the convention of torch.hub
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PublishedWeights:
    """A file of weights on a server.

    Attributes:
        url: Its address, which the installed library names.
        name: Its name in torch.hub's folder.
    """

    url: str
    name: str

    def load(self, sha256: str | None = None) -> dict[str, Any]:
        """Return the content, after a check of the SHA-256; download the file if it is missing.

        Args:
            sha256: The SHA-256 of the file; None takes the first digits, which are in its name.

        Raises:
            UserError: No SHA-256 is known, or the file has another one, contains anything but
                tensors and plain values, or is missing and cannot be downloaded.
        """
        expected = self._expected_hash(sha256)
        file = Path(torch.hub.get_dir()) / "checkpoints" / self.name
        if not file.is_file():
            with download_lock(file.parent):
                if not file.is_file():
                    self._download(file, expected)
        with file.open("rb") as content:
            actual = hashlib.file_digest(content, "sha256").hexdigest()
        if not actual.startswith(expected):
            raise UserError(
                f"{file} is damaged or a different file: its SHA-256 begins with {actual[:8]}, not "
                f"{expected[:8]}; delete it"
            )
        return _read(file)

    def _expected_hash(self, given: str | None) -> str:
        in_name = HASH_IN_NAME.search(self.name)
        if given is None and in_name:
            return in_name[1]
        if given is None:
            raise UserError(
                f"sha256=null: {self.url} is read only if its SHA-256 is known, which the library "
                "does not contain; set sha256 to the one that its page shows, or weights=null"
            )
        if not SHA256.fullmatch(given.lower()):
            raise UserError(f"sha256={given!r} is not valid; allowed: 64 hexadecimal digits")
        return given.lower()

    def _download(self, file: Path, expected: str) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(file), expected, progress=False)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{file.name} cannot be downloaded ({reason}); put {self.url} into {file.parent} "
                f"as {file.name}, or give weights=null"
            ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.suffix == ".safetensors":
            content: object = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} does not contain plain weights: {reason}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file} does not contain weights by name")
    return content
