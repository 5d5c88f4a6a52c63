"""What the experiments share about files: errors of one line, and writing whole files or none."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


class BadInput(ValueError):
    """Something given cannot be used. The message is one line that says what to do."""


def write(path: Path, body: str | Callable[[Path], None]) -> None:
    """Makes the file `path` complete or not at all.

    body: its text, or a function that writes the file it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if isinstance(body, str):
            partial.write_text(body, encoding="utf-8")
        else:
            body(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The first 16 digits, enough to tell files apart."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
