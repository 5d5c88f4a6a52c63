"""What the operators refuse: the sentences of csrc/ops/checks.cpp. Sizes may be symbolic."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from asymq.reference import LINKS

# As C++ calls them.
_DTYPES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.bool: "Bool",
}
_MOST_AXES = 16


class Traits(NamedTuple):
    """Names of a parameterization and of its tensors, as csrc/include/asymq/parameterization.h."""

    name: str
    family: str
    learned: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    full_range: bool = False

    @property
    def symmetric(self) -> bool:
        return self.name.startswith("symmetric")

    @property
    def row(self) -> str:
        """Its name in reference.PARAMETERIZATIONS."""
        return self.name + "_full_range" * self.full_range

    @property
    def slots(self) -> tuple[str, str, str, str]:
        """Of first, second, min and max; "" where there is none."""
        low = "min" if "min" in self.fixed else ""
        return self.learned[0], (*self.learned, "")[1], low, "max" if self.fixed else ""


_SYMMETRIC = (
    Traits("symmetric_scale", "scale_offset", ("scale",)),
    Traits("symmetric_max", "min_max", ("max",)),
    Traits("symmetric_gamma", "beta_gamma", ("gamma",), ("max",)),
)
# By the number that the private operators have for one.
TRAITS = (
    Traits("scale_offset", "scale_offset", ("scale", "offset")),
    Traits("min_max", "min_max", ("min", "max")),
    Traits("beta_gamma", "beta_gamma", ("beta", "gamma"), ("min", "max")),
    Traits("kscale_koffset", "kscale_koffset", ("kscale", "koffset")),
    *_SYMMETRIC,
    *(traits._replace(full_range=True) for traits in _SYMMETRIC),
)
NO_QUANTIZER = -1


def refusal(where: str, message: str) -> RuntimeError:
    return RuntimeError(f"asymq::{where}: {message}")


def dtype_name(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype))


def traits_of(parameterization: int) -> Traits:
    if not 0 <= parameterization < len(TRAITS):
        raise RuntimeError(
            f"asymq: parameterization must be between 0 and {len(TRAITS) - 1}, got "
            f"{parameterization}"
        )
    return TRAITS[parameterization]


def find_parameterization(op: str, family: str, symmetric: bool, full_range: bool) -> int:
    for number, traits in enumerate(TRAITS):
        if (traits.family, traits.symmetric, traits.full_range) == (family, symmetric, full_range):
            return number
    raise RuntimeError(
        f"asymq::{op}: parameterization must be scale_offset, min_max, beta_gamma or "
        "kscale_koffset, full_range belongs to symmetric, and kscale_koffset has no symmetric "
        f"counterpart; got {family}{', symmetric' * symmetric}{', full_range' * full_range}"
    )


def link_number(where: str, sigmoid: bool, link: str) -> int:
    if link not in LINKS:
        names = "identity, sigmoid, exp, softplus or clamp"
        raise refusal(where, f"link must be {names}, got {link}")
    if sigmoid and link not in ("identity", "sigmoid"):
        raise refusal(
            where,
            "sigmoid is a link itself: leave it out or the other one, got sigmoid and the link "
            f"{link}",
        )
    return list(LINKS).index("sigmoid" if sigmoid else link)


def check_bits(where: str, bits: int) -> None:
    if not 2 <= bits <= 16:
        raise refusal(where, f"bits must be between 2 and 16, got {bits}")


def check_positive(where: str, name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise refusal(where, f"{name} must be positive and finite, got {value:g}")


def check_kind(
    where: str, traits: Traits, bits: int, eps: float, link: int, gradient_scale: float
) -> None:
    check_bits(where, bits)
    check_positive(where, "eps", eps)
    check_positive(where, "gradient_scale", gradient_scale)
    if not 0 <= link < len(LINKS):
        raise refusal(where, f"link must be between 0 and {len(LINKS) - 1}, got {link}")
    if link != 0 and traits.family != "beta_gamma":
        raise refusal(
            where,
            f"link belongs to the factors of beta_gamma, got the link {[*LINKS][link]} with "
            f"{traits.name}",
        )


def check_elements(where: str, name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        got = dtype_name(x.dtype)
        raise refusal(where, f"{name} must be float32, float64, bfloat16 or float16, got {got}")
    if x.device.type == "mps":
        raise refusal(
            where,
            "the gradients of ranges are summed in float64, which an mps device lacks: move the "
            f"model and {name} to the CPU",
        )


def name_ranges(
    where: str, traits: Traits, tensors: Sequence[Tensor | None]
) -> list[tuple[str, Tensor]]:
    """tensors: first, second, min and max."""
    named = []
    for name, tensor in zip(traits.slots, tensors, strict=True):
        if (tensor is not None) != (name != ""):
            number = "more" if tensor is None else "fewer"
            raise refusal(where, f"takes {number} range tensors than it got")
        if tensor is not None:
            named.append((name, tensor))
    return named


def check_alike(where: str, ranges: Sequence[tuple[str, Tensor]], wide: bool) -> None:
    """wide: whether float64 ranges will do."""
    first_name, first = ranges[0]
    for name, tensor in ranges:
        got = dtype_name(tensor.dtype)
        if tensor.dtype != torch.float32 and not (wide and tensor.dtype == torch.float64):
            needed = "float32 or float64" if wide else "float32"
            raise refusal(where, f"{name} must be {needed}, got {got}")
        if tensor.dtype != first.dtype:
            wanted = dtype_name(first.dtype)
            raise refusal(where, f"{name} must have {first_name}'s dtype {wanted}, got {got}")
        _check_place(where, name, tensor, f"{first_name}'s", first)


def check_ends(where: str, min: Tensor, max: Tensor) -> None:
    if not min.is_floating_point():
        raise refusal(where, f"min must be floating, got {dtype_name(min.dtype)}")
    check_twin(where, "max", max, "min's", min)


def check_twin(where: str, name: str, tensor: Tensor, owner: str, other: Tensor) -> None:
    """Like another in dtype, device and shape. owner: of these, such as "min's"."""
    if tensor.dtype != other.dtype:
        wanted, got = dtype_name(other.dtype), dtype_name(tensor.dtype)
        raise refusal(where, f"{name} must have {owner} dtype {wanted}, got {got}")
    _check_place(where, name, tensor, owner, other)


def _check_place(where: str, name: str, tensor: Tensor, owner: str, other: Tensor) -> None:
    check_device(where, name, tensor, owner, other)
    if tensor.shape != other.shape:
        wanted, got = list(other.shape), list(tensor.shape)
        raise refusal(where, f"{name} must have {owner} shape {wanted}, got {got}")


def check_device(where: str, name: str, tensor: Tensor, owner: str, other: Tensor) -> None:
    if tensor.device != other.device:
        wanted, got = other.device, tensor.device
        raise refusal(where, f"{name} must be on {owner} device {wanted}, got {got}")


def check_granularity(where: str, x: Tensor, ranges: Sequence[tuple[str, Tensor]]) -> None:
    """Ranges that divide x."""
    name, first = ranges[0]
    check_device(where, name, first, "x's", x)
    if x.dim() > _MOST_AXES:
        raise refusal(where, f"x must have at most {_MOST_AXES} dimensions, got {x.dim()}")
    if first.dim() != x.dim():
        if first.numel() != 1:
            raise refusal(
                where,
                f"{name} has shape {list(first.shape)}: it must have one element or as many "
                f"dimensions as x, whose shape is {list(x.shape)}",
            )
        return
    for axis, (size, count) in enumerate(zip(x.shape, first.shape, strict=True)):
        if not (count == 1 or count == size or (count != 0 and size % count == 0)):
            raise refusal(
                where,
                f"{name} has shape {list(first.shape)}, which does not divide x's shape "
                f"{list(x.shape)} at axis {axis}",
            )


def check_logits(where: str, logits: Tensor, classes: int | None) -> None:
    shape = list(logits.shape)
    if len(shape) != 2:
        raise refusal(where, f"logits must have 2 dimensions, [tokens, classes], got shape {shape}")
    check_elements(where, "logits", logits)
    if shape[1] < 1:
        raise refusal(where, f"logits must have at least one class, got shape {shape}")
    if classes is not None and not 1 <= classes <= shape[1]:
        raise refusal(
            where,
            f"classes must be between 1 and the number of the logits' columns {shape[1]}, got "
            f"{classes}",
        )


def check_labels(where: str, labels: Tensor, logits: Tensor) -> None:
    """What they say is not looked at."""
    if labels.dtype != torch.int64:
        raise refusal(where, f"labels must be int64, got {dtype_name(labels.dtype)}")
    if labels.dim() != 1 or labels.shape[0] != logits.shape[0]:
        raise refusal(
            where,
            "labels must have one element per row of the logits, shape "
            f"[{logits.shape[0]}], got {list(labels.shape)}",
        )
    check_device(where, "labels", labels, "the logits'", logits)


def check_grad(where: str, name: str, grad: Tensor, x: Tensor) -> None:
    check_like(where, "the upstream gradient", grad, name, x)


def check_like(where: str, name: str, tensor: Tensor, other: str, x: Tensor) -> None:
    if tensor.shape != x.shape:
        wanted, got = list(x.shape), list(tensor.shape)
        raise refusal(where, f"{name} must have {other}'s shape {wanted}, got {got}")
    check_kin(where, name, tensor, other, x)


def check_kin(where: str, name: str, tensor: Tensor, other: str, x: Tensor) -> None:
    """Of the dtype and on the device of another."""
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise refusal(
            where,
            f"{name} must be {dtype_name(x.dtype)} on {x.device} like {other}, got "
            f"{dtype_name(tensor.dtype)} on {tensor.device}",
        )


def check_mask(where: str, mask: Tensor, scores: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        got = dtype_name(mask.dtype)
        raise refusal(where, f"mask must be bool (true: seen) or floating (added), got {got}")
    check_device(where, "mask", mask, "the scores'", scores)
    sizes = zip(reversed(mask.shape), reversed(scores.shape), strict=False)
    if mask.dim() > 4 or not all(size in (1, wanted) for size, wanted in sizes):
        raise refusal(
            where,
            f"mask has shape {list(mask.shape)}, which does not broadcast against the scores' "
            f"shape {list(scores.shape)}",
        )
