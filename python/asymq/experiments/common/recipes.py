"""Deployment recipes of QuantConfig as command lines and file names have them."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentTypeError
from dataclasses import dataclass

import asymq

RECIPES = ("w4a16", "w4a8", "w8a8", "w4a4", "npu")
FORM = "NAME[:key=value,...]"


@dataclass(frozen=True)
class Recipe:
    """A recipe and all its arguments, None left out: two that are equal make equal configurations,
    and no others do. Every quantizer of it learns factors of its range (beta_gamma)."""

    name: str
    arguments: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str, besides: tuple[str, ...] = ()) -> Recipe:
        """Of "w4a8:group=32,cache=8", an argparse type. ArgumentTypeError: there is no such recipe,
        it has no such argument, or does not take the value. besides: what else may be given there,
        for the error."""
        name, colon, rest = text.partition(":")
        if name not in RECIPES:
            known = ", ".join((*besides, *RECIPES))
            raise ArgumentTypeError(f"no recipe {name!r}: choose from {known}")
        arguments = defaults = _defaults(name)
        for part in rest.split(",") if colon else ():
            key, _, value = part.partition("=")
            if key not in defaults:
                raise ArgumentTypeError(
                    f"{text}: {name} has no {key!r}; it takes {', '.join(defaults)}"
                )
            if not re.fullmatch("[0-9]+", value):
                raise ArgumentTypeError(f"{text}: {key} must be an integer, got {value!r}")
            arguments = arguments | {key: int(value)}
        recipe = cls._of(name, arguments)
        try:
            recipe.config()
        except ValueError as error:
            raise ArgumentTypeError(f"{text}: {error}") from None
        return recipe

    @classmethod
    def named(cls, slug: str) -> Recipe | None:
        """The inverse of `slug`; None: it is that of no recipe."""
        name, *parts = slug.split("-")
        found = [re.fullmatch("([a-z]+)([0-9]+)", part) for part in parts]
        if name not in RECIPES or None in found:
            return None
        return cls._of(name, {part[1]: int(part[2]) for part in found if part})

    @classmethod
    def _of(cls, name: str, arguments: dict[str, int | None]) -> Recipe:
        return cls(name, tuple((k, v) for k, v in arguments.items() if v is not None))

    @property
    def slug(self) -> str:
        """In file names, such as "w4a8-group32-cache8"."""
        return "-".join([self.name, *(f"{key}{value}" for key, value in self.arguments)])

    def __str__(self) -> str:
        """As typed, with all arguments."""
        given = ",".join(f"{key}={value}" for key, value in self.arguments)
        return f"{self.name}:{given}" if given else self.name

    def config(self) -> asymq.QuantConfig:
        arguments = dict.fromkeys(_defaults(self.name)) | dict(self.arguments)
        return getattr(asymq.QuantConfig, self.name)(**arguments)


def _defaults(name: str) -> dict[str, int | None]:
    parameters = inspect.signature(getattr(asymq.QuantConfig, name)).parameters
    return {key: parameter.default for key, parameter in parameters.items()}
