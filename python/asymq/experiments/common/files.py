"""What the experiments share about files: errors of one line, whole files or none, and locks."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class BadInput(ValueError):
    """Something given cannot be used. The message is one line that says what to do."""


def first_line(message: str | Exception) -> str:
    """What an error says, or else what it is."""
    return (str(message).strip() or type(message).__name__).splitlines()[0]


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


def remove_partial_files(out: Path, name: str) -> None:
    """What a killed process left half written of files of `out` that are called `name`."""
    for leftover in out.rglob(f".{name}.*.partial"):
        leftover.unlink(missing_ok=True)


def as_csv(header: Iterable, rows: Iterable[Iterable]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()


def need_writable(out: Path) -> None:
    """Makes the folder `out`. BadInput: nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}") from None


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone has the lock `path` during the block; with `wait` it has, once
    the others have given it back.

    The system takes it back when its process ends, however that happens.
    """
    with _locked(path, wait) as file:
        if file is None:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[io.TextIOWrapper | None]:
    while True:
        with _opened(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            # Its last owner may have deleted the file between opening and locking it.
            if _is_at(path, file):
                yield file
                return


def _opened(path: Path) -> io.TextIOWrapper:
    """The file `path`, made with its folder, which other processes delete where it is empty."""
    attempts = 100
    while True:
        attempts -= 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("w")
        except (FileNotFoundError, FileExistsError):
            if not attempts:
                raise


def _is_at(path: Path, file: io.TextIOWrapper) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def sha256(path: Path) -> str:
    """The first 16 digits, enough to tell files apart."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
