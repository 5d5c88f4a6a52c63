"""Text for language models: where it comes from, windows of tokens, perplexity."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from asymq.experiments.common.files import BadInput, first_line

TRAIN, TEST = "wiki.train.raw", "wiki.test.raw"


@dataclass(frozen=True)
class Text:
    """A text and where it was read."""

    source: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()[:16]


def read(
    data: str | None, train_text: Path | None = None, test_text: Path | None = None
) -> tuple[Text, Text]:
    """The texts to learn from and to evaluate on.

    data: a folder with wiki.train.raw and wiki.test.raw, or a dataset of the Hugging Face hub as
    NAME or NAME:CONFIGURATION, of which the splits "train" and "test" are read. train_text and
    test_text, each a file, replace its parts. BadInput: missing, empty or unreadable.
    """
    if train_text and test_text:
        return _of_file(train_text), _of_file(test_text)
    if data is None:
        raise BadInput("no text: give --data, or both --train-text and --test-text")
    given, folder = (train_text, test_text), Path(data)
    if folder.is_dir():
        files = zip(given, (TRAIN, TEST), strict=True)
        train, test = (_of_file(file or folder / name) for file, name in files)
    elif folder.exists() or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise BadInput(f"--data {data}: no such folder; it should hold {TRAIN} and {TEST}")
    else:
        splits = zip(given, ("train", "test"), strict=True)
        train, test = (_of_file(file) if file else _of_hub(data, name) for file, name in splits)
    return train, test


def _of_file(path: Path) -> Text:
    try:
        # As the bytes are: newlines are tokens too.
        content = path.read_bytes().decode()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; it should be a text file") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not a text in UTF-8") from None
    if not content.strip():
        raise BadInput(f"{path}: has no text")
    return Text(path.name, content)


def _of_hub(data: str, split: str) -> Text:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise BadInput(
            f"--data {data}: is no folder, and reading a dataset of the hub needs `pip install "
            "datasets`"
        ) from None
    name, _, configuration = data.partition(":")
    try:
        rows = load_dataset(name, configuration or None, split=split)["text"]
    except Exception as error:
        raise BadInput(
            f"--data {data}: neither a folder nor a dataset that loads: {first_line(error)}"
        ) from None
    # WikiText's rows end as its lines do; the empty ones stand for lines of one blank.
    lines = (row if row.endswith("\n") else f"{row or ' '}\n" for row in rows)
    return Text(f"{data}, {split}", "".join(lines))


def tokenize(tokenizer, text: str, by_line: bool = False) -> Tensor:
    """Token ids [n] of the whole text, tokenized at once or line by line (as the run_clm example of
    transformers does, blank lines being empty); with the special tokens that the tokenizer adds to
    a text, or to a line."""
    if not by_line:
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    lines = [line if line.strip() else "" for line in text.splitlines(keepends=True)]
    ids = tokenizer(lines, verbose=False)["input_ids"]
    return torch.tensor([token for line in ids for token in line])


def windows(ids: Tensor, context: int, source: str) -> Tensor:
    """ids cut into rows of `context` tokens; what is left over is dropped."""
    if len(ids) < context:
        raise BadInput(
            f"{source}: has {len(ids)} tokens, less than one window of {context}; give a longer "
            "text or a smaller --context"
        )
    return ids[: len(ids) // context * context].view(-1, context)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def batch_of(windows: Tensor, step: int, size: int, seed: int) -> Tensor:
    """The batch [size, context] of a step (from 0): every epoch goes through all windows in an
    order of its own, so that a batch is a function of seed and step alone."""
    count = len(windows)
    positions = range(step * size, (step + 1) * size)
    rows = [_permutation(count, seed, p // count)[p % count] for p in positions]
    return windows[torch.stack(rows)]


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, batch: int) -> float:
    """exp of the mean loss over all windows; NaN or infinite if the model's loss is."""
    device = next(model.parameters()).device
    total = 0.0
    for ids in windows.split(batch):
        ids = ids.to(device)
        total += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * len(ids)
    mean = total / len(windows)
    return math.exp(mean) if mean < 700 else mean if math.isnan(mean) else math.inf
