"""Text for a sweep: the sources and documentation of installed Python packages, as tokens.

``python -m asymq.experiments.scaling_law.corpus FOLDER`` takes the packages of this environment, or
of another folder of installed ones, whose licences are permissive, every file once, in an order
that mixes them. It leaves FOLDER/tokens.u16, the ids as little-endian integers of 16 bits,
FOLDER/tokenizer.json, a byte-level BPE trained on the first of them, and FOLDER/about.json, the
packages with versions, licences and bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from asymq.experiments.common.command import Parser, integer
from asymq.experiments.common.files import BadInput, need_writable, write
from asymq.experiments.common.quickstart import END, byte_level_bpe
from asymq.experiments.scaling_law.tokens import ABOUT, TOKENS

ENDINGS = (".py", ".pyi", ".rst", ".md")
LONGEST = 1 << 20  # bytes of a file: longer ones are tables
TO_LEARN = 20 << 20  # bytes that the tokenizer is trained on
BATCH = 4096  # files tokenized at a time
_PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|HPND|Zlib|Unlicense|CC0|0BSD)", re.I
)
_OTHER = re.compile(r"GPL|MPL|Mozilla|EUPL|CDDL|Proprietary|NVIDIA|Other|Commercial", re.I)


@dataclass
class Package:
    """What the text has of a package; licence: as its metadata say it."""

    name: str
    version: str
    licence: str
    files: int = 0
    bytes: int = 0


@dataclass
class Texts:
    """Every file once, by its hash, in whose order they are, and the packages they are of."""

    of: dict[bytes, Path] = field(default_factory=dict)
    packages: list[Package] = field(default_factory=list)

    def add(self, package: Package, paths: Iterable[Path]) -> None:
        for path in paths:
            content = _text(path)
            if content is None:
                continue
            key = hashlib.sha256(content.encode()).digest()
            if key not in self.of:
                self.of[key] = path
                package.files += 1
                package.bytes += len(content.encode())
        if package.files:
            self.packages.append(package)

    def __iter__(self) -> Iterator[str]:
        for key in sorted(self.of):
            yield _text(self.of[key]) or ""


def _text(path: Path) -> str | None:
    """None: it is empty, too long, no text, or not there."""
    try:
        content = path.read_bytes()
        return content.decode() if content.strip() and len(content) <= LONGEST else None
    except (OSError, UnicodeDecodeError):
        return None


def licence_of(distribution: Distribution) -> str | None:
    """As a package's metadata say it, None if that is not a permissive one."""
    about = distribution.metadata
    said = list(about.get_all("License-Expression") or ())
    said += [text[:80] for text in about.get_all("License") or ()]
    said += [c for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    whole = "; ".join(part.strip().replace("\n", " ") for part in said if part.strip())
    return whole if _PERMISSIVE.search(whole) and not _OTHER.search(whole) else None


def gather(folder: Path | None) -> Texts:
    """The texts of the packages installed in a folder, or of this environment and Python."""
    texts = Texts()
    if folder is None:
        root = Path(sysconfig.get_path("stdlib"))
        own = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
        texts.add(Package("Python", platform.python_version(), "PSF-2.0"), own)
    found = distributions(path=[str(folder)]) if folder else distributions()
    for distribution in sorted(found, key=lambda d: d.metadata["Name"].lower()):
        licence = licence_of(distribution)
        if licence:
            package = Package(distribution.metadata["Name"], distribution.version, licence)
            paths = [Path(str(f.locate())) for f in distribution.files or () if f.suffix in ENDINGS]
            texts.add(package, sorted(paths))
    return texts


def _first(texts: Iterable[str], size: int) -> Iterator[str]:
    for text in texts:
        size -= len(text)
        if size < 0:
            return
        yield text


def tokenize(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """uint16; every text ends with END."""
    end = tokenizer.token_to_id(END)
    parts: list[np.ndarray] = []
    batch: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.encode_batch_fast(batch):
            parts.append(np.array([*encoding.ids, end], dtype="<u2"))
        batch.clear()

    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            flush()
    flush()
    return np.concatenate(parts)


def build(out: Path, packages: Path | None, vocabulary: int) -> dict:
    """Writes the folder; what its about.json says. BadInput: there is nothing to write."""
    need_writable(out)
    texts = gather(packages)
    if not texts.of:
        raise BadInput(f"{packages or 'this environment'}: has no package of a permissive licence")
    tokenizer = byte_level_bpe(_first(texts, TO_LEARN), vocabulary)
    ids = tokenize(tokenizer, texts)
    about = {
        "source": "sources and documentation of Python packages",
        "vocabulary": tokenizer.get_vocab_size(),
        "tokens": len(ids),
        "bytes": sum(package.bytes for package in texts.packages),
        "files": len(texts.of),
        "packages": [asdict(package) for package in texts.packages],
    }
    write(out / TOKENS, lambda path: ids.tofile(path))
    write(out / "tokenizer.json", tokenizer.to_str())
    write(out / ABOUT, json.dumps(about, indent=1) + "\n")
    return about


def main() -> None:
    parser = Parser("corpus", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--packages", type=Path, metavar="DIR", help="of installed ones (default this environment)"
    )
    parser.add_argument("--vocabulary", type=integer(257, 65535), default=8192, metavar="N")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        about = build(args.folder, args.packages, args.vocabulary)
    except (BadInput, OSError) as error:
        parser.error(error)
    print(
        f"{about['tokens']:,} tokens of {about['bytes'] / 1e6:.0f} MB, {about['files']:,} files, "
        f"{len(about['packages'])} packages, in {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
