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
_MOST_IN_ROW = 2**31 - 1


class Traits(NamedTuple):
    """Names of a parameterization and of its tensors, as in csrc/include/asymq/parameterization.h."""

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


def require(holds: bool, where: str, *message: object) -> None:
    """RuntimeError with the message, whose pieces are put together only then."""
    if not holds:
        raise RuntimeError(f"asymq::{where}: {''.join(map(_said, message))}")


def _said(piece: object) -> str:
    if isinstance(piece, torch.dtype):
        return _DTYPES.get(piece, str(piece))
    if isinstance(piece, float):
        return f"{piece:g}"
    return str(list(piece)) if isinstance(piece, torch.Size) else str(piece)


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
    names = ("identity, sigmoid, exp, softplus or clamp",)
    require(link in LINKS, where, "link must be ", *names, ", got ", link)
    require(
        not sigmoid or link in ("identity", "sigmoid"),
        *(where, "sigmoid is a link itself: leave it out or the other one, got sigmoid and the "),
        *("link ", link),
    )
    return list(LINKS).index("sigmoid" if sigmoid else link)


def check_bits(where: str, bits: int) -> None:
    require(2 <= bits <= 16, where, "bits must be between 2 and 16, got ", bits)


def check_positive(where: str, name: str, value: float) -> None:
    positive = value > 0 and math.isfinite(value)
    require(positive, where, name, " must be positive and finite, got ", float(value))


def check_kind(
    where: str, traits: Traits, bits: int, eps: float, link: int, gradient_scale: float
) -> None:
    check_bits(where, bits)
    check_positive(where, "eps", eps)
    check_positive(where, "gradient_scale", gradient_scale)
    last = len(LINKS) - 1
    require(0 <= link <= last, where, "link must be between 0 and ", last, ", got ", link)
    require(
        link == 0 or traits.family == "beta_gamma",
        *(where, "link belongs to the factors of beta_gamma, got the link ", [*LINKS][link]),
        *(" with ", traits.name),
    )


def check_elements(where: str, name: str, x: Tensor) -> None:
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
    kinds = " must be float32, float64, bfloat16 or float16, got "
    require(x.dtype in dtypes, where, name, kinds, x.dtype)
    require(
        x.device.type != "mps",
        *(where, "the gradients of ranges are summed in float64, which an mps device lacks: move "),
        *("the model and ", name, " to the CPU"),
    )


Named = Sequence[tuple[str, Tensor]]


def name_ranges(where: str, traits: Traits, tensors: Sequence[Tensor | None]) -> Named:
    """tensors: first, second, min and max."""
    for name, tensor in zip(traits.slots, tensors, strict=True):
        more = "fewer" if tensor is not None else "more"
        fits = (tensor is not None) == (name != "")
        require(fits, where, "takes ", more, " range tensors than it got")
    return [(name, t) for name, t in zip(traits.slots, tensors, strict=True) if t is not None]


def check_alike(where: str, ranges: Named, wide: bool) -> None:
    """wide: whether float64 ranges will do."""
    first_name, first = ranges[0]
    needed = "float32 or float64" if wide else "float32"
    for name, range_ in ranges:
        fits = range_.dtype == torch.float32 or (wide and range_.dtype == torch.float64)
        require(fits, where, name, " must be ", needed, ", got ", range_.dtype)
        for what in ("dtype", "device", "shape"):
            preposition = " must be on " if what == "device" else " must have "
            expected, got = getattr(first, what), getattr(range_, what)
            pieces = f"{first_name}'s {what} ", expected, ", got ", got
            require(got == expected, where, name, preposition, *pieces)


def check_granularity(where: str, x: Tensor, ranges: Named) -> None:
    name, range_ = ranges[0]
    pieces = name, " must be on x's device ", x.device, ", got ", range_.device
    require(range_.device == x.device, where, *pieces)
    pieces = "x must have at most ", _MOST_AXES, " dimensions, got ", x.dim()
    require(x.dim() <= _MOST_AXES, where, *pieces)
    has = name, " has shape ", range_.shape
    if range_.dim() != x.dim():
        require(
            range_.numel() == 1,
            *(where, *has, ": it must have one element or as many dimensions as x, whose shape is "),
            x.shape,
        )
        return
    for axis, (size, count) in enumerate(zip(x.shape, range_.shape, strict=True)):
        divides = count == 1 or count == size or (count != 0 and size % count == 0)
        pieces = ", which does not divide x's shape ", x.shape, " at axis ", axis
        require(divides, where, *has, *pieces)


def check_ends(where: str, min: Tensor, max: Tensor) -> None:
    require(min.is_floating_point(), where, "min must be floating, got ", min.dtype)
    require(
        max.dtype == min.dtype, where, "max must have min's dtype ", min.dtype, ", got ", max.dtype
    )
    pieces = "max must be on min's device ", min.device, ", got ", max.device
    require(max.device == min.device, where, *pieces)
    pieces = "max must have min's shape ", min.shape, ", got ", max.shape
    require(max.shape == min.shape, where, *pieces)


def check_logits(where: str, logits: Tensor) -> None:
    pieces = "logits must have 2 dimensions, [tokens, classes], got shape ", logits.shape
    require(logits.dim() == 2, where, *pieces)
    check_elements(where, "logits", logits)
    classes = logits.shape[1]
    pieces = "logits must have at least one class, got shape ", logits.shape
    require(classes >= 1, where, *pieces)
    pieces = "logits must have less than 2^31 classes, got ", classes
    require(classes <= _MOST_IN_ROW, where, *pieces)


def check_labels(where: str, labels: Tensor, logits: Tensor) -> None:
    require(labels.dtype == torch.int64, where, "labels must be int64, got ", labels.dtype)
    rows = logits.shape[0]
    pieces = "labels must have one element per row of the logits, shape [", rows, "], got "
    require(labels.dim() == 1 and labels.shape[0] == rows, where, *pieces, labels.shape)
    pieces = "labels must be on the logits' device ", logits.device, ", got ", labels.device
    require(labels.device == logits.device, where, *pieces)


def check_grad(where: str, name: str, grad: Tensor, x: Tensor) -> None:
    pieces = "the upstream gradient must have ", name, "'s shape ", x.shape, ", got ", grad.shape
    require(grad.shape == x.shape, where, *pieces)
    check_twin(where, "the upstream gradient", grad, name, x)


def check_twin(where: str, name: str, tensor: Tensor, other: str, x: Tensor) -> None:
    """Of the dtype and on the device of x."""
    require(
        tensor.dtype == x.dtype and tensor.device == x.device,
        *(where, name, " must be ", x.dtype, " on ", x.device, " like ", other, ", got "),
        *(tensor.dtype, " on ", tensor.device),
    )


def check_mask(where: str, mask: Tensor, scores: Tensor) -> None:
    require(
        mask.dtype == torch.bool or mask.is_floating_point(),
        *(where, "mask must be bool (true: seen) or floating (added), got ", mask.dtype),
    )
    pieces = "mask must be on the scores' device ", scores.device, ", got ", mask.device
    require(mask.device == scores.device, where, *pieces)
    sizes = zip(reversed(mask.shape), reversed(scores.shape), strict=False)
    require(
        mask.dim() <= 4 and all(size in (1, wanted) for size, wanted in sizes),
        *(where, "mask has shape ", mask.shape, ", which does not broadcast against the scores' "),
        *("shape ", scores.shape),
    )
