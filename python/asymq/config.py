"""Which quantizers a model gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from asymq.quantizers import PerChannel, QuantSpec
from asymq.quantizers.spec import Json

KINDS = ("weight", "activation", "norm_weight")


def _matches(pattern: str, name: str, kind: str) -> bool:
    """Whether a wildcard name, with or without "kind:" before it, selects a quantizer."""
    wanted, colon, rest = pattern.partition(":")
    if colon and wanted in KINDS:
        return kind == wanted and fnmatchcase(name, rest)
    return fnmatchcase(name, pattern)


@dataclass(frozen=True)
class QuantConfig(Json):
    """The quantizers of a model.

    weight, activation, norm_weight: what weights (of Linear, Conv1D and Embedding), activations and
    weights of normalization layers get; None: no quantizer. overrides: wildcard names of quantizers
    (as `summary` prints them) to what those get instead, the last match deciding;
    ``"weight:*h.0.*"`` selects among the quantizers of one kind. skip: wildcard names, likewise, of
    quantizers left out.
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    norm_weight: QuantSpec | None = None
    overrides: Mapping[str, QuantSpec | None] = field(default_factory=dict)
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.overrides, Mapping):
            raise ValueError(
                "QuantConfig: overrides must map wildcard names to QuantSpecs, got "
                f"{self.overrides!r}"
            )
        object.__setattr__(self, "overrides", dict(self.overrides))
        object.__setattr__(
            self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        )
        specs = {kind: getattr(self, kind) for kind in KINDS}
        specs |= {f"overrides[{name!r}]": spec for name, spec in self.overrides.items()}
        for name, spec in specs.items():
            if spec is not None and not isinstance(spec, QuantSpec):
                raise ValueError(f"QuantConfig: {name} must be a QuantSpec or None, got {spec!r}")

    @classmethod
    def table2(
        cls, parameterization: str, *, weight_bits: int = 4, activation_bits: int = 12
    ) -> QuantConfig:
        """The paper's setting for language models (its Table 2): weights 4 bits, symmetric, per
        output channel; activations and LayerNorm weights 12 bits, asymmetric, per tensor."""
        activation = QuantSpec(activation_bits).with_parameterization(parameterization)
        weight = QuantSpec(weight_bits, symmetric=True, granularity=PerChannel())
        return cls(weight.with_parameterization(parameterization), activation, activation)

    def replace(self, **changes) -> QuantConfig:
        """This configuration with other fields, such as ``config.replace(norm_weight=None)``."""
        return dataclasses.replace(self, **self._known(changes))

    def spec_of(self, name: str, kind: str) -> QuantSpec | None:
        """What the quantizer `name` of `kind` ("weight", "activation" or "norm_weight") gets."""
        if any(_matches(pattern, name, kind) for pattern in self.skip):
            return None
        spec = getattr(self, kind)
        for pattern, override in self.overrides.items():
            if _matches(pattern, name, kind):
                spec = override
        return spec

    def unmatched(self, kinds: Mapping[str, str]) -> list[str]:
        """The wildcard names of overrides and skip that match none of the quantizers, whose kinds
        are given by name."""
        return [
            pattern
            for pattern in (*self.overrides, *self.skip)
            if not any(_matches(pattern, name, kind) for name, kind in kinds.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        def of(spec):
            return None if spec is None else spec.to_dict()

        return {
            **{kind: of(getattr(self, kind)) for kind in KINDS},
            "overrides": {name: of(spec) for name, spec in self.overrides.items()},
            "skip": list(self.skip),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        def of(spec):
            return None if spec is None else QuantSpec.from_dict(spec)

        arguments = cls._known(values)
        for kind in KINDS:
            if kind not in arguments:
                raise ValueError(f"QuantConfig: {kind} is missing (null: no such quantizers)")
            arguments[kind] = of(arguments[kind])
        overrides = arguments.get("overrides", {})
        arguments["overrides"] = {name: of(spec) for name, spec in overrides.items()}
        return cls(**arguments)
