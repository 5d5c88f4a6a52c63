"""What the command lines share: errors of one line, checked values, a dataclass as options."""

from __future__ import annotations

import argparse
import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import field, fields

from asymq.experiments.common.files import BadInput, first_line


class Parser(argparse.ArgumentParser):
    """Its errors are one line, with exit code 2."""

    def error(self, message: str | Exception):
        self.exit(2, f"{self.prog}: error: {first_line(message)}\n")


# ---- argparse types ----------------------------------------------------------------------------


def integer(least: int, most: float = math.inf) -> Callable[[str], int]:
    """An integer from `least` to `most`."""
    allowed = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise ArgumentTypeError(f"must be an integer {allowed}, got {text!r}")
        return value

    return convert


bit_width = integer(2, 16)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def learning_rate(text: str) -> str:
    """Kept as typed: results are named after it."""
    positive(text)
    return text


def number(text: str) -> str:
    """A positive number as results are named after it: all spellings of one are the same."""
    digits, _, exponent = f"{positive(text):e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def distinct_rates(rates: list[str]) -> list[str]:
    """Learning rates as typed, equal ones once."""
    return list({float(rate): rate for rate in rates}.values())


# ---- a dataclass as options --------------------------------------------------------------------


def option(default, text: str, check: Callable[[str], object] | None = None, **more):
    """A field of a dataclass that add_options makes an option: its default, its help, its argparse
    type, and further arguments of add_argument. group: the group of options it is listed in."""
    return field(default=default, metadata={"help": text, "type": check, **more})


def add_options(groups: dict[str, argparse._ArgumentGroup], cls: type) -> None:
    """Adds the options of a dataclass, by name of their group."""
    for name, default, metadata in _options(cls):
        more = dict(metadata)
        group, text, check = more.pop("group"), more.pop("help"), more.pop("type")
        if isinstance(default, bool):
            more |= {"action": argparse.BooleanOptionalAction}
        else:
            more |= {"type": check}
        if default is not None and not isinstance(default, bool):
            shown = str(default).replace("e-0", "e-")
            text = f"{text} (default {shown})" if text else f"default {shown}"
        groups[group].add_argument(flag(name), default=default, help=text, **more)


def options_of(cls: type, arguments: argparse.Namespace):
    """The dataclass that was given on the command line."""
    return cls(**{name: getattr(arguments, name) for name, *_ in _options(cls)})


def check_options(values) -> None:
    """BadInput: a dataclass has a value that the command line would refuse."""
    for name, default, metadata in _options(type(values)):
        value, check, choices = getattr(values, name), metadata["type"], metadata.get("choices")
        if choices and value != default and value not in choices:
            raise BadInput(f"{flag(name)}: must be of {', '.join(choices)}, got {value!r}")
        if isinstance(default, bool) and not isinstance(value, bool):
            raise BadInput(f"{flag(name)}: must be True or False, got {value!r}")
        try:
            if check and value != default:
                check(str(value))
        except ArgumentTypeError as error:
            raise BadInput(f"{flag(name)}: {error}") from None


def _options(cls: type) -> list[tuple]:
    return [(f.name, f.default, f.metadata) for f in fields(cls) if "help" in f.metadata]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
