"""What is trained: models of given sizes, each on its tokens, in float and quantized."""

from __future__ import annotations

import itertools
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import asymq
from asymq.experiments.common.command import check_options, integer, option, positive
from asymq.experiments.common.files import BadInput
from asymq.scaling_law import PAPER_LAWS

FLOAT, TOKEN = "bf16", "token"  # the baselines' precision; one range a token
PRECISIONS = tuple(PAPER_LAWS)
FEWEST_STEPS = 20


@dataclass(frozen=True, order=True)
class Size:
    """Of a Llama whose MLP is three times as wide."""

    width: int
    layers: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Of "64x2", an argparse type."""
        found = re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", text)
        if not found:
            raise ArgumentTypeError(f"must be WIDTHxLAYERS, such as 64x2, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    @property
    def params(self) -> int:
        """Of the blocks: without embedding, head and the norm before it."""
        matrices = 4 * self.width**2 + 3 * self.width * 3 * self.width
        return self.layers * (matrices + 2 * self.width)

    def __str__(self) -> str:
        return f"{self.width}x{self.layers}"


def group(text: str) -> int | str:
    """An argparse type."""
    return TOKEN if text == TOKEN else integer(2)(text)


def token_count(text: str) -> int:
    """An argparse type: such as 400000 or 4e5."""
    value = positive(text)
    if value != int(value):
        raise ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(value)


@dataclass(frozen=True)
class Cell:
    """One training. group: TOKEN is one range a token, None that of a baseline."""

    size: Size
    tokens: int
    precision: str
    group: int | str | None
    seed: int

    def __str__(self) -> str:
        grouped = () if self.group is None else (str(self.group),)
        parts = (str(self.size), str(self.tokens), self.precision, *grouped, f"seed{self.seed}")
        return " ".join(parts)

    @property
    def name(self) -> str:
        """In file names."""
        return str(self).replace(" ", "__")

    @property
    def elements(self) -> int | None:
        """How many share a range, as the law counts them."""
        return self.size.width if self.group == TOKEN else self.group  # type: ignore[return-value]

    @property
    def key(self) -> tuple:
        """As runs are told apart, which know the number of elements alone."""
        return self.size, self.tokens, self.precision, self.elements, self.seed

    @property
    def config(self) -> asymq.QuantConfig | None:
        if self.group is None:
            return None
        return asymq.QuantConfig.scaling_law(self.precision, self.group)  # type: ignore[arg-type]


def _training(*given, **more):
    return option(*given, group="training", **more)


@dataclass(frozen=True)
class Settings:
    """How every cell is trained. BadInput: a value is not allowed."""

    batch: int = _training(8, "windows a step", integer(1))
    context: int = _training(64, "tokens a window", integer(2))
    head: int = _training(32, "width of a head", integer(2), metavar="N")
    lr: float = _training(6e-3, "highest rate at width 32, falling as width^-1/2", positive)

    def __post_init__(self):
        check_options(self)

    def rate(self, size: Size) -> float:
        return float(self.lr) * math.sqrt(32 / size.width)

    def steps(self, tokens: int) -> int:
        return tokens // (self.batch * self.context)


def grid(
    sizes: Sequence[Size],
    tokens: Sequence[int],
    groups: Sequence[int | str],
    precisions: Iterable[str],
    seeds: Sequence[int],
) -> list[Cell]:
    """All combinations, and their baselines before them."""
    quantized = [p for p in dict.fromkeys(precisions) if p != FLOAT]
    kinds = [(FLOAT, None), *itertools.product(quantized, dict.fromkeys(groups))]
    return [
        Cell(size, count, precision, group, seed)
        for seed, count, size, (precision, group) in itertools.product(
            dict.fromkeys(seeds), dict.fromkeys(tokens), dict.fromkeys(sizes), kinds
        )
    ]


def need_trainable(cells: Iterable[Cell], settings: Settings, available: int) -> None:
    """BadInput: a head or a group does not divide a width, two groups are one, or a number of
    tokens is more than there are or less than twenty steps."""
    found: dict[tuple, Cell] = {}
    for cell in cells:
        width, steps = cell.size.width, settings.steps(cell.tokens)
        if width % settings.head:
            raise BadInput(f"--head {settings.head}: does not divide the width of {cell.size}")
        if isinstance(cell.group, int) and width % cell.group:
            raise BadInput(f"--groups {cell.group}: does not divide the width of {cell.size}")
        if steps < FEWEST_STEPS:
            raise BadInput(
                f"--tokens {cell.tokens}: are {steps} steps of {settings.batch} x "
                f"{settings.context}; it takes {FEWEST_STEPS}"
            )
        if cell.tokens > available:
            raise BadInput(
                f"--tokens {cell.tokens}: the text has {available} to train on, and no token is "
                "seen twice; give a longer one as --data"
            )
        if found.setdefault(cell.key, cell) != cell:
            raise BadInput(
                f"--groups {cell.elements}: is one range a token at {cell.size}, as {TOKEN} is; "
                "give one of them"
            )
