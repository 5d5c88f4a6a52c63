"""What a quantizer is: bits, granularity, parameterization; and which quantizers a model gets.

Specifications are immutable, compare by value, and go to and from JSON. One that cannot be raises
ValueError when it is made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import ClassVar

# Learned tensors of a (parameterization, symmetric), in the order of the operators' arguments.
_LEARNED = {
    ("scale_offset", False): ("scale", "offset"),
    ("min_max", False): ("min", "max"),
    ("beta_gamma", False): ("beta", "gamma"),
    ("kscale_koffset", False): ("kscale", "koffset"),
    ("scale_offset", True): ("scale",),
    ("min_max", True): ("max",),
    ("beta_gamma", True): ("gamma",),
}
PARAMETERIZATIONS = tuple(name for name, symmetric in _LEARNED if not symmetric)


@dataclass(frozen=True)
class PerTensor:
    """One range for the whole tensor."""

    per: ClassVar[str] = "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One range per index of ``axis``.

    None: the output channel of the module a weight belongs to (axis 0 of Linear and Embedding, 1 of
    Conv1D), the last axis of an activation.
    """

    axis: int | None = None
    per: ClassVar[str] = "channel"


@dataclass(frozen=True)
class PerGroup:
    """One range per ``size`` consecutive elements along ``axis``.

    None: the reduction axis of a weight, the last axis of an activation. A weight's groups have
    ranges of their own in every row; an activation's are shared by all other axes.
    """

    size: int
    axis: int | None = None
    per: ClassVar[str] = "group"

    def __post_init__(self):
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"PerGroup: size must be an integer of at least 1, got {self.size!r}")


Granularity = PerTensor | PerChannel | PerGroup
_GRANULARITIES = {cls.per: cls for cls in (PerTensor, PerChannel, PerGroup)}


def split_parameterization(name: str) -> tuple[str, bool]:
    """The parameterization and whether its factors are sigmoids, of a name such as
    "beta_gamma_sigmoid"."""
    sigmoid = name == "beta_gamma_sigmoid"
    base = "beta_gamma" if sigmoid else name
    if base not in PARAMETERIZATIONS:
        known = ", ".join((*PARAMETERIZATIONS, "beta_gamma_sigmoid"))
        raise ValueError(f"asymq: unknown parameterization {name!r}; there are {known}")
    return base, sigmoid


class _Json:
    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str):
        return cls.from_dict(json.loads(text))

    @classmethod
    def _known(cls, values: Mapping) -> dict:
        """`values` as keyword arguments; a field this version does not know is an error."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown fields {sorted(unknown)}")
        return dict(values)


@dataclass(frozen=True)
class QuantSpec(_Json):
    """One kind of quantizer.

    bits: 2 to 16. symmetric: the grid is symmetric around 0 and the counterpart of the
    parameterization is learned (s, θmax or γ). granularity: which elements share a range.
    parameterization: "scale_offset", "min_max", "beta_gamma" or "kscale_koffset". sigmoid
    (beta_gamma alone): the factors are σ(β) and σ(γ). dynamic (beta_gamma alone): θmin and θmax are
    the live minimum and maximum of the whole tensor, in a causal model of later tokens too. fix_min
    (min_max and beta_gamma, asymmetric): the lower end does not learn, for one-sided data. eps: the
    least effective scale.
    """

    bits: int = 8
    symmetric: bool = False
    granularity: Granularity = field(default_factory=PerTensor)
    parameterization: str = "beta_gamma"
    sigmoid: bool = False
    dynamic: bool = False
    fix_min: bool = False
    eps: float = 1e-8

    def __post_init__(self):
        def need(holds, what):
            if not holds:
                raise ValueError(f"QuantSpec: {what}")

        name = self.parameterization
        need(
            isinstance(self.bits, int) and 2 <= self.bits <= 16,
            f"bits must be an integer from 2 to 16, got {self.bits!r}",
        )
        need(
            isinstance(self.granularity, Granularity),
            f"granularity must be PerTensor(), PerChannel() or PerGroup(size), got "
            f"{self.granularity!r}",
        )
        need(
            name in PARAMETERIZATIONS,
            f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}, got {name!r}",
        )
        need(
            (name, self.symmetric) in _LEARNED,
            f"{name} has no symmetric counterpart; symmetric needs scale_offset, min_max or "
            "beta_gamma",
        )
        for option in ("sigmoid", "dynamic"):
            need(
                not getattr(self, option) or name == "beta_gamma",
                f"{option} belongs to beta_gamma, got parameterization {name!r}",
            )
        need(
            not self.fix_min or (name in ("min_max", "beta_gamma") and not self.symmetric),
            f"fix_min belongs to asymmetric min_max and beta_gamma, got parameterization {name!r}"
            + (", symmetric" if self.symmetric else ""),
        )
        need(0 < self.eps < math.inf, f"eps must be positive and finite, got {self.eps!r}")

    @property
    def steps(self) -> int:
        """k = 2^bits - 1."""
        return 2**self.bits - 1

    @property
    def learned(self) -> tuple[str, ...]:
        """The operator's learnable arguments, in its order (with fix_min the first is constant)."""
        return _LEARNED[self.parameterization, self.symmetric]

    @property
    def constants(self) -> tuple[str, ...]:
        """The operator's constant arguments, which follow the learnable ones."""
        if self.parameterization != "beta_gamma":
            return ()
        return ("max",) if self.symmetric else ("min", "max")

    @property
    def operator(self) -> str:
        """The function of :mod:`asymq.ops` that evaluates this quantizer."""
        name = f"symmetric_{self.learned[-1]}" if self.symmetric else self.parameterization
        return f"fake_quantize_{name}"

    def with_parameterization(self, name: str) -> QuantSpec:
        """This quantizer under another parameterization, "beta_gamma_sigmoid" among them. The
        symmetric counterpart of kscale_koffset is taken to be the learned scale."""
        base, sigmoid = split_parameterization(name)
        if base == "kscale_koffset" and self.symmetric:
            base = "scale_offset"
        return replace(self, parameterization=base, sigmoid=sigmoid)

    def to_dict(self) -> dict:
        return {
            **asdict(self),
            "granularity": {"per": self.granularity.per, **asdict(self.granularity)},
        }

    @classmethod
    def from_dict(cls, values: Mapping) -> QuantSpec:
        arguments = cls._known(values)
        granularity = dict(arguments.pop("granularity", {"per": "tensor"}))
        per = granularity.pop("per", None)
        if per not in _GRANULARITIES:
            raise ValueError(
                f"QuantSpec: granularity must be per tensor, channel or group, got {per!r}"
            )
        try:
            granularity = _GRANULARITIES[per](**granularity)
        except TypeError as error:
            raise ValueError(f"QuantSpec: granularity per {per}: {error}") from None
        return cls(granularity=granularity, **arguments)


@dataclass(frozen=True)
class QuantConfig(_Json):
    """The quantizers of a model.

    weight, activation, norm_weight: what weights (of Linear, Conv1D and Embedding), activations and
    LayerNorm weights get; None: no quantizer. overrides: wildcard names of quantizers (as
    `summary` prints them) to what those get instead, the last match deciding. skip: wildcard names
    of quantizers left out.
    """

    weight: QuantSpec | None
    activation: QuantSpec | None
    norm_weight: QuantSpec | None
    overrides: Mapping[str, QuantSpec | None] = field(default_factory=dict)
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "overrides", dict(self.overrides))
        object.__setattr__(
            self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        )
        specs = {kind: getattr(self, kind) for kind in ("weight", "activation", "norm_weight")}
        specs |= {f"overrides[{name!r}]": spec for name, spec in self.overrides.items()}
        for name, spec in specs.items():
            if spec is not None and not isinstance(spec, QuantSpec):
                raise ValueError(f"QuantConfig: {name} must be a QuantSpec or None, got {spec!r}")

    @classmethod
    def table2(cls, parameterization: str) -> QuantConfig:
        """The paper's setting for language models (its Table 2): weights 4 bits, symmetric, per
        output channel; activations and LayerNorm weights 12 bits, asymmetric, per tensor."""
        activation = QuantSpec(bits=12).with_parameterization(parameterization)
        weight = QuantSpec(bits=4, symmetric=True, granularity=PerChannel())
        return cls(weight.with_parameterization(parameterization), activation, activation)

    def spec_of(self, name: str, kind: str) -> QuantSpec | None:
        """What the quantizer `name` of `kind` ("weight", "activation" or "norm_weight") gets."""
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        spec = getattr(self, kind)
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern):
                spec = override
        return spec

    def unmatched(self, names: list[str]) -> list[str]:
        """The wildcard names of overrides and skip that match none of `names`."""
        return [
            pattern
            for pattern in (*self.overrides, *self.skip)
            if not any(fnmatchcase(name, pattern) for name in names)
        ]

    def to_dict(self) -> dict:
        def of(spec):
            return None if spec is None else spec.to_dict()

        return {
            "weight": of(self.weight),
            "activation": of(self.activation),
            "norm_weight": of(self.norm_weight),
            "overrides": {name: of(spec) for name, spec in self.overrides.items()},
            "skip": list(self.skip),
        }

    @classmethod
    def from_dict(cls, values: Mapping) -> QuantConfig:
        def of(spec):
            return None if spec is None else QuantSpec.from_dict(spec)

        arguments = cls._known(values)
        for kind in ("weight", "activation", "norm_weight"):
            if kind not in arguments:
                raise ValueError(f"QuantConfig: {kind} is missing (null: no such quantizers)")
            arguments[kind] = of(arguments[kind])
        overrides = arguments.get("overrides", {})
        arguments["overrides"] = {name: of(spec) for name, spec in overrides.items()}
        return cls(**arguments)
