"""What a quantizer is: bits, granularity, parameterization.

Specifications are immutable, compare by value, and go to and from JSON. One that cannot be raises
ValueError when it is made.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from asymq._arguments import is_integer, is_number
from asymq.quantizers.granularity import Granularity, PerTensor, granularity_from_dict

# The learnable arguments of the operator of a (parameterization, symmetric), in its order.
_LEARNABLE = {
    ("scale_offset", False): ("scale", "offset"),
    ("min_max", False): ("min", "max"),
    ("beta_gamma", False): ("beta", "gamma"),
    ("kscale_koffset", False): ("kscale", "koffset"),
    ("scale_offset", True): ("scale",),
    ("min_max", True): ("max",),
    ("beta_gamma", True): ("gamma",),
}
_NOT_IN_0_1 = ("full_range", "learn", "link", "gradient_scale")
PARAMETERIZATIONS = tuple(name for name, symmetric in _LEARNABLE if not symmetric)
LINKS = ("identity", "sigmoid", "exp", "softplus", "clamp")
# What one string names: a parameterization, or beta_gamma and a link.
_SPLIT = {
    base if link == "identity" else f"{base}_{link}": (base, link)
    for base in PARAMETERIZATIONS
    for link in (LINKS if base == "beta_gamma" else LINKS[:1])
}
NAMES = tuple(_SPLIT)


def split_parameterization(name: str) -> tuple[str, str]:
    """The parameterization and the link of its factors, of a name such as "beta_gamma_sigmoid"."""
    if name not in _SPLIT:
        raise ValueError(f"asymq: unknown parameterization {name!r}; there are {', '.join(NAMES)}")
    return _SPLIT[name]


class Json(ABC):
    """To and from JSON, of a dataclass with `to_dict` and `from_dict`."""

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{cls.__name__}: not JSON: {error}") from None
        return cls.from_dict(values)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]: ...

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Mapping[str, Any]): ...

    @classmethod
    def _known(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` as keyword arguments; a field this version does not know is an error."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{cls.__name__}: needs an object of named fields, got {values!r}")
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}; it has {', '.join(names)}")
        return dict(values)


@dataclass(frozen=True)
class QuantSpec(Json):
    """One kind of quantizer.

    bits: 2 to 16. symmetric: the grid is symmetric around 0 and the counterpart of the
    parameterization is learned (s, θmax or γ). granularity: which elements share a range.
    parameterization: "scale_offset", "min_max", "beta_gamma" or "kscale_koffset". sigmoid
    (beta_gamma alone): the same as link="sigmoid". dynamic (beta_gamma alone): θmin and θmax are
    the live minimum and maximum of the whole tensor, in a causal model of later tokens too. fix_min
    (min_max and beta_gamma, asymmetric): the lower end does not learn, for one-sided data. eps: the
    least effective scale. full_range (symmetric alone): the grid has one more step below zero,
    codes -(k + 1)/2 to (k - 1)/2, such as -8 to 7 of INT4. learn: whether the range is learned;
    False: its parameters require no gradient. link (beta_gamma alone): what a factor is of what is
    learned, v: "identity" v, "sigmoid" σ(v), "exp" e^v, "softplus" log(1 + e^v), or "clamp", v held
    in [1/4, 4], whose gradient passes straight through. gradient_scale: what the gradients of the
    range's parameters are multiplied by, None for 1, or "lsq" (Esser et al. 2020): 1/√(N·Q), where
    Q is (k - 1)/2 if symmetric, else k, and N counts the elements that share a parameter: of a
    weight all, of an activation those of one sample, an index of its first axis.

    PerToken granularity makes a range dynamic: it belongs to asymmetric or symmetric beta_gamma.
    """

    bits: int = 8
    symmetric: bool = False
    granularity: Granularity = field(default_factory=PerTensor)
    parameterization: str = "beta_gamma"
    sigmoid: bool = False
    dynamic: bool = False
    fix_min: bool = False
    eps: float = 1e-8
    full_range: bool = False
    learn: bool = True
    link: str = "identity"
    gradient_scale: float | str | None = None

    def __post_init__(self) -> None:
        def need(holds, what):
            if not holds:
                raise ValueError(f"QuantSpec: {what}")

        name = self.parameterization
        need(
            is_integer(self.bits) and 2 <= self.bits <= 16,
            f"bits must be an integer from 2 to 16, got {self.bits!r}",
        )
        object.__setattr__(self, "bits", int(self.bits))  # numpy's integers, too
        for option in ("symmetric", "sigmoid", "dynamic", "fix_min", "full_range", "learn"):
            value = getattr(self, option)
            need(isinstance(value, bool), f"{option} must be True or False, got {value!r}")
        need(
            isinstance(self.granularity, Granularity),
            "granularity must be PerTensor(), PerChannel(), PerGroup(size) or PerToken(), got "
            f"{self.granularity!r}",
        )
        need(
            name in PARAMETERIZATIONS,
            f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}, got {name!r}"
            + (f": that is beta_gamma with link={_SPLIT[name][1]!r}" if name in NAMES else ""),
        )
        need(self.link in LINKS, f"link must be one of {', '.join(LINKS)}, got {self.link!r}")
        need(
            not self.sigmoid or self.link in ("identity", "sigmoid"),
            f'sigmoid=True is link="sigmoid": leave it or link={self.link!r} out',
        )
        # One spec, whichever of the two says so.
        object.__setattr__(self, "link", "sigmoid" if self.sigmoid else self.link)
        object.__setattr__(self, "sigmoid", self.link == "sigmoid")
        need(
            (name, self.symmetric) in _LEARNABLE,
            f"{name} has no symmetric counterpart; symmetric needs scale_offset, min_max or "
            "beta_gamma",
        )
        if self.granularity.of_tokens:
            need(
                name == "beta_gamma",
                f"PerToken() belongs to beta_gamma, got parameterization {name!r}: a token's range "
                "is its own, and what is learned are factors",
            )
            need(not self.fix_min, "PerToken() learns both factors: fix_min must be False")
            object.__setattr__(self, "dynamic", True)
        options = {f"link {self.link}": self.link != "identity", "dynamic": self.dynamic}
        for option, given in options.items():
            need(
                not given or name == "beta_gamma",
                f"{option} belongs to beta_gamma, got parameterization {name!r}",
            )
        need(
            not self.fix_min or (name in ("min_max", "beta_gamma") and not self.symmetric),
            f"fix_min belongs to asymmetric min_max and beta_gamma, got parameterization {name!r}"
            + (", symmetric" if self.symmetric else ""),
        )
        need(
            not self.full_range or self.symmetric,
            "full_range belongs to symmetric quantizers: an asymmetric grid has no code to spare",
        )
        need(
            is_number(self.eps) and self.eps > 0,
            f"eps must be positive and finite, got {self.eps!r}",
        )
        scale = self.gradient_scale
        need(
            scale is None or scale == "lsq" or (is_number(scale) and scale > 0),
            f'gradient_scale must be None, "lsq" or positive and finite, got {scale!r}',
        )
        if isinstance(scale, Real):
            object.__setattr__(self, "gradient_scale", float(scale))  # numpy's numbers, too

    @property
    def steps(self) -> int:
        """k = 2^bits - 1."""
        return 2**self.bits - 1

    @property
    def learnable(self) -> tuple[str, ...]:
        """The operator's learnable arguments, in its order (with fix_min the first is constant)."""
        return _LEARNABLE[self.parameterization, self.symmetric]

    @property
    def constant(self) -> tuple[str, ...]:
        """The operator's constant arguments, which follow the learnable ones."""
        if self.parameterization != "beta_gamma":
            return ()
        return ("max",) if self.symmetric else ("min", "max")

    @property
    def function(self) -> str:
        """The function of :mod:`asymq.ops` that evaluates this quantizer."""
        name = f"symmetric_{self.learnable[-1]}" if self.symmetric else self.parameterization
        return f"fake_quantize_{'dynamic_' if self.granularity.of_tokens else ''}{name}"

    @property
    def codes(self) -> tuple[int, int]:
        """The ends n and p of a symmetric grid."""
        k = self.steps
        return -((k + 1) // 2 if self.full_range else (k - 1) // 2), (k - 1) // 2

    @property
    def end_in_steps(self) -> float:
        """The end of a symmetric range, in scales."""
        return -self.codes[0] if self.full_range else self.steps / 2

    @property
    def options(self) -> list[str]:
        """The names of the options that are on."""
        names = [] if self.link == "identity" else [self.link]
        names += [n for n in ("dynamic", "fix_min", "full_range") if getattr(self, n)]
        if self.gradient_scale is not None:
            names.append(f"gradient_scale={self.gradient_scale}")
        return names + ([] if self.learn else ["not learned"])

    def scale_of_gradient(self, elements: int) -> float:
        """What the gradient of a parameter is multiplied by that so many elements share, of an
        activation those of one sample."""
        if self.gradient_scale == "lsq":
            most = (self.steps - 1) / 2 if self.symmetric else self.steps
            return (max(1, elements) * most) ** -0.5
        return 1.0 if self.gradient_scale is None else float(self.gradient_scale)

    def replace(self, **changes) -> QuantSpec:
        """This quantizer with other fields, such as ``spec.replace(bits=3)``. One that is dynamic
        for its tokens' sake is not so with another granularity, and of sigmoid and link the one
        that is named counts."""
        if self.granularity.of_tokens and "granularity" in changes:
            changes.setdefault("dynamic", False)
        if "link" in changes:
            changes.setdefault("sigmoid", False)
        elif changes.get("sigmoid", self.sigmoid) != self.sigmoid:
            changes["link"] = "identity"
        return dataclasses.replace(self, **self._known(changes))

    def with_parameterization(self, name: str) -> QuantSpec:
        """This quantizer under another parameterization, "beta_gamma_sigmoid" and the names of the
        other links among them. The symmetric counterpart of one that has none (kscale_koffset) is
        taken to be the learned scale."""
        base, link = split_parameterization(name)
        if (base, self.symmetric) not in _LEARNABLE:
            base = "scale_offset"
        return self.replace(parameterization=base, link=link)

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.sigmoid:
            values["link"] = type(self).link  # one of the two says it
        for name in _NOT_IN_0_1:
            # A state keeps the size that it has in version 0.1, which reads it.
            if values[name] == getattr(type(self), name):
                del values[name]
        return values | {"granularity": self.granularity.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantSpec:
        arguments = cls._known(values)
        granularity = granularity_from_dict(arguments.pop("granularity", {"per": "tensor"}))
        return cls(granularity=granularity, **arguments)
