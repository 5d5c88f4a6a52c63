"""What is run: methods, optimizers, and what all runs share."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass

import asymq
from asymq.experiments.common.command import (
    bit_width,
    check_options,
    integer,
    option,
    positive,
)

OPTIMIZERS = ("sgd", "adam", "adamw")
# The middle one is also the first rate of a scheduled weight, and that of what is not scheduled.
RATES = {
    "sgd": ("3e-3", "1e-2", "3e-2"),
    "adam": ("3e-4", "1e-3", "3e-3"),
    "adamw": ("3e-4", "1e-3", "3e-3"),
}
FACTORS = ("2e-3", "5e-3", "1e-2")
# What a run does with its weights, and what its value is.
METHODS = {
    "rate": "learning rate; ranges learn",
    "fixed": "learning rate; ranges of weights are fixed",
    "factor": "factor of the scheduled share of changing codes; ranges of weights are fixed",
    "freeze": "learning rate; ranges learn, and weights that oscillate are held",
}
PLAIN = ("rate", "fixed")
# What is quantized beside weights: what layers multiply them with, with one range or that of every
# token, or the output of every operation, with one range.
ACTIVATIONS = ("input", "token", "every")


@dataclass(frozen=True)
class Defaults:
    """Those that differ from task to task."""

    steps: int
    batch: int
    activations: str
    activation_bits: int | None  # None: those of the weights


def share(text: str) -> float:
    value = positive(text)
    if value >= 1:
        raise ArgumentTypeError(f"must be below 1, got {text!r}")
    return value


def _protocol(*given, **more):
    return option(*given, group="protocol", **more)


@dataclass(frozen=True)
class Protocol:
    """What every run of a command shares. None: the task's default. BadInput: a value is not
    allowed."""

    steps: int | None = _protocol(
        None, "training steps a run (default 600 of digits, 400 of text, else 2000)", integer(1)
    )
    batch: int | None = _protocol(
        None, "images or windows a step (default 64 of digits, else 8)", integer(1)
    )
    context: int | None = _protocol(
        None, "tokens a window (default 1024, at most the model's)", integer(2)
    )
    group: int | None = _protocol(
        None, "weights that share a range (default: those of an output)", integer(1), metavar="N"
    )
    activations: str | None = _protocol(
        None,
        "input, what layers multiply with weights, token, the same with a range of each token, or "
        "every, of all operations (default input of digits, else every)",
        choices=ACTIVATIONS,
    )
    activation_bits: int | None = _protocol(
        None, "default the weights' of digits, else 8", bit_width, metavar="N"
    )
    threshold: float = _protocol(
        0.01,
        "of freeze: the frequency of oscillation above which weights are held in the end",
        share,
    )
    evaluate: int | None = _protocol(
        None, "windows of the text for evaluation (default all)", integer(1), metavar="N"
    )

    def __post_init__(self):
        check_options(self)

    def config(self, bits: int) -> asymq.QuantConfig:
        """Of a protocol without None where defaults are: full grids of weights, first and last
        layer in float."""
        per = asymq.PerChannel() if self.group is None else asymq.PerGroup(self.group)
        weight = asymq.QuantSpec(bits, symmetric=True, granularity=per, full_range=True)
        values = asymq.QuantSpec(self.activation_bits or bits)
        if self.activations == "token":
            values = values.replace(granularity=asymq.PerToken())
        every = self.activations == "every"
        return asymq.QuantConfig(
            weight,
            activation=values if every else None,
            input=None if every else values,
            embedding=None,
            head=None,
        )
