"""A quantizer as the private operators have it: some arguments in a row, read here and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from asymq.composite import checks
from asymq.composite.checks import NO_QUANTIZER, Traits, dtype_name, refusal, traits_of
from asymq.reference import LINKS

_OPS = torch.ops.asymq


class Granular(NamedTuple):
    """With ranges of any granularity."""

    first: Tensor
    second: Tensor | None
    min: Tensor | None
    max: Tensor | None
    parameterization: int
    bits: int
    eps: float
    link: int
    gradient_scale: float

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters in the order of the public functions."""
        return [t for t in self[:4] if t is not None]

    def check(self, where: str, x: Tensor | None = None) -> list[tuple[str, Tensor]]:
        """The ranges with their names. x: what they are to quantize."""
        traits = traits_of(self.parameterization)
        checks.check_kind(where, traits, *self[5:])
        if x is not None:
            checks.check_elements(where, "x", x)
        ranges = checks.name_ranges(where, traits, self[:4])
        checks.check_alike(where, ranges, wide=x is None or x.dtype == torch.float64)
        return ranges

    def arguments(self) -> tuple[str, int, float, str]:
        """What the functions of `asymq.reference` take before the tensors."""
        row = traits_of(self.parameterization).row
        return row, 2**self.bits - 1, self.eps, [*LINKS][self.link]


class Live(NamedTuple):
    """With ranges that are those of x, of a token or of a weight's groups."""

    first: Tensor
    second: Tensor | None
    group: int | None
    parameterization: int
    bits: int
    eps: float
    link: int
    gradient_scale: float
    token: bool

    @property
    def factors(self) -> list[Tensor]:
        return [t for t in self[:2] if t is not None]

    def check(self, where: str, x: Tensor) -> None:
        traits = traits_of(self.parameterization)
        if traits.family != "beta_gamma":
            message = "a live range needs factors, those of beta_gamma or symmetric_gamma"
            raise refusal(where, message)
        checks.check_kind(where, traits, *self[4:8])
        checks.check_elements(where, "x", x)
        self._check_group(where, x)
        two = len(traits.learned) == 2
        if (self.second is not None) != two:
            needs = "takes two factors, got one" if two else "takes one factor, got two"
            raise refusal(where, needs)
        named = list(zip(traits.learned, self.factors, strict=True))
        checks.check_alike(where, named, x.dtype == torch.float64)
        self._check_factors(where, traits.learned[0], x)

    def _check_group(self, where: str, x: Tensor) -> None:
        if x.dim() == 0:
            raise refusal(
                where,
                "x must have at least one dimension, the last of which makes the groups, got shape "
                "[]",
            )
        if self.group is None:
            return
        if self.group < 1:
            needs = "at least 1, or None for all of x's last axis"
            raise refusal(where, f"group must be {needs}, got {self.group}")
        if x.shape[-1] % self.group != 0:
            size = x.shape[-1]
            raise refusal(
                where, f"group must divide x's last axis of {size} elements, got {self.group}"
            )

    def _check_factors(self, where: str, name: str, x: Tensor) -> None:
        checks.check_device(where, name, self.first, "x's", x)
        count = self.first.numel()
        in_row = 1 if self.group is None else x.shape[-1] // self.group
        if count == 1 or count == in_row:
            return
        groups = in_row
        for size in x.shape[:-1]:
            groups = groups * size
        got = f"got shape {list(self.first.shape)} for x's shape {list(x.shape)}"
        if self.token:
            raise refusal(
                where,
                f"{name} must have 1 value or one for each of the {in_row} groups of a row, which "
                f"all rows share, {got}",
            )
        if count != groups:
            raise refusal(
                where,
                f"{name} must have 1 value, one for each of the {in_row} groups of a row or one "
                f"for each of all {groups}, {got}",
            )


class Quantizer(NamedTuple):
    """With one range, or one of each token, or none, as the operators have it that do more than
    quantize."""

    ranges: Sequence[Tensor]
    parameterization: int
    bits: int
    eps: float
    link: int
    gradient_scale: float
    token: bool
    group: int | None

    @property
    def exists(self) -> bool:
        return self.parameterization != NO_QUANTIZER

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid; x itself where there is none."""
        if not self.exists:
            return x
        if self.token:
            return _OPS._fake_quantize_dynamic.default(x, *self._live())
        return _OPS._fake_quantize.default(x, *self._granular())

    def backward(self, grad: Tensor, x: Tensor, needs: Sequence[bool]) -> tuple:
        """dL/dx, which is always computed, then the gradients that ``needs`` asks for of the two
        learned tensors, None for the others."""
        if not self.exists:
            return grad, None, None
        needs = [True, *needs]
        if self.token:
            return _OPS._fake_quantize_dynamic_backward.default(grad, x, *self._live(), needs)
        return _OPS._fake_quantize_backward.default(grad, x, *self._granular(), needs)

    def _kind(self) -> tuple[int, int, float, int, float]:
        return self.parameterization, self.bits, self.eps, self.link, self.gradient_scale

    def granular(self, op: str) -> Granular:
        traits = traits_of(self.parameterization)
        self._check_count(op, traits, (*traits.learned, *traits.fixed))
        return self._granular()

    def _granular(self) -> Granular:
        slots, tensors = traits_of(self.parameterization).slots, iter(self.ranges)
        first, second, low, high = (next(tensors) if name else None for name in slots)
        assert first is not None
        return Granular(first, second, low, high, *self._kind())

    def _live(self) -> Live:
        first, *rest = self.ranges
        return Live(first, rest[0] if rest else None, self.group, *self._kind(), True)

    def check(self, op: str, whose: str, name: str, x: Tensor) -> Quantizer:
        """With one range. whose: what errors call it, such as "input's ". x: the operator's
        argument ``name``."""
        traits = traits_of(self.parameterization)
        where = f"{op}: {whose}{traits.name}"
        if self.token:
            raise refusal(
                where, "takes one range, not one of each token, which fake_quantize_dynamic_* have"
            )
        (first_name, first), *_ = self.granular(op).check(where, x)
        if first.numel() != 1:
            got = list(first.shape)
            raise refusal(where, f"{first_name} must have one element, got shape {got}")
        if first.device != x.device:
            raise refusal(
                where,
                f"{first_name} must be on the device of {name}, {x.device}, got {first.device}",
            )
        return self

    def check_any(self, op: str, whose: str, name: str, x: Tensor) -> Quantizer:
        """With one range, one of each token, or none. x: of the shape that is quantized."""
        if not self.exists:
            return self
        if not self.token:
            return self.check(op, whose, name, x)
        traits = traits_of(self.parameterization)
        self._check_count(op, traits, traits.learned)
        self._live().check(f"{op}: {whose}{traits.name}", x)
        return self

    def _check_count(self, op: str, traits: Traits, names: Sequence[str]) -> None:
        count = len(self.ranges)
        if count < len(names):
            needs = f"needs the parameter {names[count]}, got {count} parameters"
            raise refusal(op, f"{traits.name} {needs}")
        if count > len(names):
            raise refusal(op, f"{traits.name} needs {len(names)} parameters, got {count}")


QUANTIZER_PARTS = len(Quantizer._fields)


def read(arguments: Sequence) -> list[Quantizer]:
    """The quantizers that the arguments in a row are."""
    starts = range(0, len(arguments), QUANTIZER_PARTS)
    return [Quantizer(*arguments[i : i + QUANTIZER_PARTS]) for i in starts]


def read_pair(
    op: str, name: str, x: Tensor, whose: tuple[str, str], arguments: Sequence
) -> tuple[Quantizer, Quantizer]:
    """A quantizer before and one after another function of the argument ``name``."""
    before, after = (
        quantizer.check(op, owner, name, x)
        for quantizer, owner in zip(read(arguments), whose, strict=True)
    )
    wanted, got = before.ranges[0].dtype, after.ranges[0].dtype
    if got != wanted:
        raise refusal(
            op,
            f"the {whose[1]}range must have the dtype of the {whose[0]}{dtype_name(wanted)}, got "
            f"{dtype_name(got)}",
        )
    return before, after
