"""What a quantizer is: bits, granularity, parameterization.

Specifications are immutable, compare by value, and go to and from JSON. One that cannot be raises
ValueError when it is made.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

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
_NOT_IN_0_1 = ("full_range", "learn")
PARAMETERIZATIONS = tuple(name for name, symmetric in _LEARNABLE if not symmetric)


def split_parameterization(name: str) -> tuple[str, bool]:
    """The parameterization and whether its factors are sigmoids, of a name such as
    "beta_gamma_sigmoid"."""
    sigmoid = name == "beta_gamma_sigmoid"
    base = "beta_gamma" if sigmoid else name
    if base not in PARAMETERIZATIONS:
        known = ", ".join((*PARAMETERIZATIONS, "beta_gamma_sigmoid"))
        raise ValueError(f"asymq: unknown parameterization {name!r}; there are {known}")
    return base, sigmoid


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
    (beta_gamma alone): the factors are σ(β) and σ(γ). dynamic (beta_gamma alone): θmin and θmax are
    the live minimum and maximum of the whole tensor, in a causal model of later tokens too. fix_min
    (min_max and beta_gamma, asymmetric): the lower end does not learn, for one-sided data. eps: the
    least effective scale. full_range (symmetric alone): the grid has one more step below zero,
    codes -(k + 1)/2 to (k - 1)/2, such as -8 to 7 of INT4. learn: whether the range is learned;
    False: its parameters require no gradient.

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

    def __post_init__(self) -> None:
        def need(holds, what):
            if not holds:
                raise ValueError(f"QuantSpec: {what}")

        name = self.parameterization
        need(
            isinstance(self.bits, Integral)
            and not isinstance(self.bits, bool)
            and 2 <= self.bits <= 16,
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
            + (": that is beta_gamma with sigmoid=True" if name == "beta_gamma_sigmoid" else ""),
        )
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
        need(
            not self.full_range or self.symmetric,
            "full_range belongs to symmetric quantizers: an asymmetric grid has no code to spare",
        )
        need(
            isinstance(self.eps, Real) and 0 < self.eps < math.inf,
            f"eps must be positive and finite, got {self.eps!r}",
        )

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
        names = ("sigmoid", "dynamic", "fix_min", "full_range")
        return [n for n in names if getattr(self, n)] + ([] if self.learn else ["not learned"])

    def replace(self, **changes) -> QuantSpec:
        """This quantizer with other fields, such as ``spec.replace(bits=3)``. One that is dynamic
        for its tokens' sake is not so with another granularity."""
        if self.granularity.of_tokens and "granularity" in changes:
            changes.setdefault("dynamic", False)
        return dataclasses.replace(self, **self._known(changes))

    def with_parameterization(self, name: str) -> QuantSpec:
        """This quantizer under another parameterization, "beta_gamma_sigmoid" among them. The
        symmetric counterpart of one that has none (kscale_koffset) is taken to be the learned
        scale."""
        base, sigmoid = split_parameterization(name)
        if (base, self.symmetric) not in _LEARNABLE:
            base = "scale_offset"
        return self.replace(parameterization=base, sigmoid=sigmoid)

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
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
