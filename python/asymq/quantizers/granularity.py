"""Which elements of a tensor share a range.

A granularity computes the shape of its ranges and places them on a tensor: nobody else asks which
one it is. A new one is a class here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch

from asymq._arguments import is_integer

_ONE = torch.Size([1])


class Labelled(Protocol):
    """Whom an error names, where no name shall be made for every tensor."""

    @property
    def label(self) -> str: ...


class Granularity(ABC):
    """What the classes below have in common. `owner`, in all methods: whom an error names."""

    per: ClassVar[str]
    # Whether every token of an activation has a range of its own, which the operator takes from it:
    # the range tensors are factors that all tokens share.
    of_tokens: ClassVar[bool] = False

    @property
    def of_whole_tokens(self) -> bool:
        """Whether that range is one for the whole token."""
        return self.of_tokens and self.options()["group"] is None

    @abstractmethod
    def of_weight(
        self, owner: str, shape: Sequence[int], channel_axis: int, reduction_axis: int
    ) -> torch.Size:
        """Shape of the ranges of a weight of `shape`: [1], or as many dimensions as the weight.
        channel_axis, reduction_axis: where a granularity without an axis applies."""

    @abstractmethod
    def of_activation(self, owner: str, channels: int | None) -> torch.Size:
        """Shape of the ranges of an activation, of one dimension. channels: the size of the axis
        they lie along, None where only the tensors know it."""

    @abstractmethod
    def on_activation(self, owner: Labelled, x: torch.Tensor, channels: int | None) -> torch.Size:
        """The shape in which those ranges broadcast, in blocks, over the activation x."""

    @abstractmethod
    def need_last_axis(self, owner: str) -> None:
        """ValueError where the ranges lie along an axis other than the last."""

    @abstractmethod
    def __str__(self) -> str:
        """As `summary` prints it."""

    def options(self) -> dict[str, Any]:
        """What the operator needs to know beside the range tensors."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        return {"per": self.per, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One range for the whole tensor: ranges of shape [1]."""

    per: ClassVar[str] = "tensor"

    def of_weight(
        self, owner: str, shape: Sequence[int], channel_axis: int, reduction_axis: int
    ) -> torch.Size:
        return _ONE

    def of_activation(self, owner: str, channels: int | None) -> torch.Size:
        return _ONE

    def on_activation(self, owner: Labelled, x: torch.Tensor, channels: int | None) -> torch.Size:
        return _ONE

    def need_last_axis(self, owner: str) -> None:
        pass

    def __str__(self) -> str:
        return "per tensor"


class _AlongAxis(Granularity):
    """Ranges that lie along one axis."""

    axis: int | None

    @abstractmethod
    def _count(self, owner: str, size: int) -> int:
        """Ranges along an axis of `size` elements."""

    @abstractmethod
    def _sizes(self, shape: list[int], axis: int, count: int) -> list[int]:
        """The shape of a weight's ranges of which `count` lie along `axis`."""

    def _weight_axis(self, channel_axis: int, reduction_axis: int) -> int:
        return channel_axis

    def of_weight(
        self, owner: str, shape: Sequence[int], channel_axis: int, reduction_axis: int
    ) -> torch.Size:
        axis = self._weight_axis(channel_axis, reduction_axis) if self.axis is None else self.axis
        axis = _in_range(owner, axis, len(shape))
        return torch.Size(self._sizes(list(shape), axis, self._count(owner, shape[axis])))

    def of_activation(self, owner: str, channels: int | None) -> torch.Size:
        if channels is None:
            raise ValueError(f"{owner}: {self!r} needs an axis of known size (channels)")
        return torch.Size([self._count(owner, channels)])

    def on_activation(self, owner: Labelled, x: torch.Tensor, channels: int | None) -> torch.Size:
        assert channels is not None
        axis = _in_range(owner.label, -1 if self.axis is None else self.axis, x.dim())
        if x.shape[axis] != channels:
            raise RuntimeError(
                f"{owner.label}: axis {axis} of the activation must have {channels} channels, got "
                f"shape {list(x.shape)}"
            )
        shape = [1] * x.dim()
        shape[axis] = self._count(owner.label, channels)
        return torch.Size(shape)

    def need_last_axis(self, owner: str) -> None:
        if self.axis not in (None, -1):
            raise ValueError(
                f"{owner}: {self!r} names an axis whose size the tensors decide; ranges must exist "
                "before: use the last axis (None)"
            )

    def __str__(self) -> str:
        return self._title() + ("" if self.axis is None else f", axis {self.axis}")

    @abstractmethod
    def _title(self) -> str: ...


@dataclass(frozen=True)
class PerChannel(_AlongAxis):
    """One range per index of ``axis``: of an activation ranges of shape [channels], of a Linear's
    weight [out, 1].

    None: the output channel of the module a weight belongs to (axis 0 of Linear and Embedding, 1 of
    Conv1D), the last axis of an activation.
    """

    axis: int | None = None
    per: ClassVar[str] = "channel"

    def _count(self, owner: str, size: int) -> int:
        return size

    def _sizes(self, shape: list[int], axis: int, count: int) -> list[int]:
        return [count if i == axis else 1 for i in range(len(shape))]

    def _title(self) -> str:
        return "per channel"


@dataclass(frozen=True)
class PerGroup(_AlongAxis):
    """One range per ``size`` consecutive elements along ``axis``: of an activation ranges of shape
    [channels / size], of a Linear's weight [out, in / size].

    None: the reduction axis of a weight, the last axis of an activation. A weight's groups have
    ranges of their own in every row; an activation's are shared by all other axes.
    """

    size: int
    axis: int | None = None
    per: ClassVar[str] = "group"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _positive("PerGroup: size", self.size))

    def _count(self, owner: str, size: int) -> int:
        return _groups(owner, self.size, size)

    def _sizes(self, shape: list[int], axis: int, count: int) -> list[int]:
        return [*shape[:axis], count, *shape[axis + 1 :]]

    def _weight_axis(self, channel_axis: int, reduction_axis: int) -> int:
        return reduction_axis

    def _title(self) -> str:
        return f"groups of {self.size}"


@dataclass(frozen=True)
class PerToken(Granularity):
    """A range for each token of an activation, which is all but its last axis, or with ``group``
    for each ``group`` consecutive elements of a token: the smallest to the largest element, zero
    included, times learned factors that all tokens share.

    Factors of shape [1], with a group [channels / group]. No token sees another.
    """

    group: int | None = None
    per: ClassVar[str] = "token"
    of_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.group is not None:
            object.__setattr__(self, "group", _positive("PerToken: group", self.group))

    def of_weight(
        self, owner: str, shape: Sequence[int], channel_axis: int, reduction_axis: int
    ) -> torch.Size:
        raise ValueError(f"{owner}: a weight has no tokens: use PerChannel() or PerGroup(size)")

    def of_activation(self, owner: str, channels: int | None) -> torch.Size:
        if self.group is None:
            return _ONE
        if channels is None:
            raise ValueError(f"{owner}: {self!r} needs a last axis of known size (channels)")
        return torch.Size([_groups(owner, self.group, channels)])

    def on_activation(self, owner: Labelled, x: torch.Tensor, channels: int | None) -> torch.Size:
        """That of the factors: the operator itself places them."""
        if self.group is None:
            return _ONE
        assert channels is not None
        if x.dim() == 0 or x.shape[-1] != channels:
            raise RuntimeError(
                f"{owner.label}: the last axis of the activation must have {channels} channels, "
                f"got shape {list(x.shape)}"
            )
        return torch.Size([channels // self.group])

    def need_last_axis(self, owner: str) -> None:
        pass

    def options(self) -> dict[str, Any]:
        return {"group": self.group}

    def __str__(self) -> str:
        return "per token" if self.group is None else f"per token, groups of {self.group}"


_BY_NAME: dict[str, type[Granularity]] = {
    cls.per: cls for cls in (PerTensor, PerChannel, PerGroup, PerToken)
}


def granularity_from_dict(values: Mapping[str, Any]) -> Granularity:
    """What `to_dict` described. ValueError if it cannot be."""
    arguments = dict(values)
    per = arguments.pop("per", None)
    if per not in _BY_NAME:
        known = ", ".join(_BY_NAME)
        raise ValueError(f"QuantSpec: granularity must be per {known}; got {per!r}")
    try:
        return _BY_NAME[per](**arguments)
    except TypeError as error:
        raise ValueError(f"QuantSpec: granularity per {per}: {error}") from None


def _positive(what: str, size: Any) -> int:
    if not (is_integer(size) and size >= 1):
        raise ValueError(f"{what} must be an integer of at least 1, got {size!r}")
    return int(size)


def _groups(owner: str, size: int, axis: int) -> int:
    if axis % size:
        raise ValueError(f"{owner}: groups of {size} do not divide an axis of {axis}")
    return axis // size


def _in_range(owner: str, axis: int, dims: int) -> int:
    if not -dims <= axis < dims:
        raise ValueError(f"{owner}: axis must be in [-{dims}, {dims}), got {axis}")
    return axis % dims
