"""A text as tokens: the sources of Python's standard library, a file, or a folder of `corpus`."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asymq.experiments.common.files import BadInput

TOKENS, ABOUT = "tokens.u16", "about.json"
MOST_HELD_OUT = 1_000_000


@dataclass(frozen=True)
class Tokens:
    """Token ids below `vocabulary`: those to train on [n] in their order, of which every cell takes
    the first ones, and those held out [m], a 20th of all or a million."""

    source: str
    vocabulary: int
    sha256: str
    train: np.ndarray
    held_out: np.ndarray


def read(data: str | None) -> Tokens:
    """data: a file, of which every byte is a token; a folder that `corpus` has written; None: the
    standard library's sources, in an order that mixes its packages. BadInput: it is neither."""
    if data is None:
        return _of("the standard library's sources", 256, _bytes(_standard_library()))
    path = Path(data)
    if path.is_dir():
        return _of_folder(path)
    try:
        return _of(path.name, 256, _bytes(path.read_bytes()))
    except OSError as error:
        raise BadInput(f"--data {data}: {error.strerror}; give a text or a folder") from None


def _of(source: str, vocabulary: int, ids: np.ndarray) -> Tokens:
    count = min(MOST_HELD_OUT, len(ids) // 20)
    if not count:
        raise BadInput(f"--data: {source} has {len(ids)} tokens, too few to hold some out")
    digest = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
    return Tokens(source, vocabulary, digest, ids[:-count], ids[-count:])


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def _standard_library() -> bytes:
    root = Path(sysconfig.get_path("stdlib"))
    names = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(path.parts)
    ]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    return b"\n".join((root / name).read_bytes() for name in names)


def _of_folder(folder: Path) -> Tokens:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        ids = np.fromfile(folder / TOKENS, dtype="<u2")
        vocabulary = int(about["vocabulary"])
    except OSError as error:
        raise BadInput(
            f"--data {folder}: {error.filename} cannot be read: {error.strerror}; write the folder "
            "with python -m asymq.experiments.scaling_law.corpus"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"--data {folder}: its {ABOUT} is damaged") from None
    if len(ids) and ids.max() >= vocabulary:
        raise BadInput(f"--data {folder}: has tokens above the {vocabulary} of its {ABOUT}")
    return _of(about.get("source", folder.name), vocabulary, ids)
