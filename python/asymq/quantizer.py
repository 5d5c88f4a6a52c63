"""Quantizers as modules: a spec, its range tensors, and a state.

Range tensors bear the names of the operators' arguments. Learned ones are parameters, constant ones
buffers; ``initial_<name>`` keeps the value that calibration (or a conversion) gave a learned one,
which the step rules need. All are NaN until then, have their final shape from the start, and keep
their dtype whatever the module is cast to.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from asymq import ops
from asymq.specs import PerChannel, PerGroup, PerTensor, QuantSpec

QUANTIZING, OBSERVING, OFF = "quantizing", "observing", "off"


def _axis(owner: str, axis: int, dims: int) -> int:
    if not -dims <= axis < dims:
        raise ValueError(f"{owner}: axis must be in [-{dims}, {dims}), got {axis}")
    return axis % dims


def _groups(owner: str, size: int, group: int) -> int:
    if size % group:
        raise ValueError(f"{owner}: groups of {group} do not divide an axis of {size}")
    return size // group


class Quantizer(nn.Module):
    """What activations' and weights' quantizers share.

    ``state`` is "quantizing", "observing" (records extrema, passes x on) or "off" (passes x on).
    Quantizing before calibration raises RuntimeError.
    """

    kind: str
    # Where the functions come from: asymq.ops, or asymq.reference to compare with.
    functions = ops

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        name: str = "",
        device=None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.name = name
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{self.label}: ranges must be float32 or float64, got {dtype}")
        self.range_dtype = dtype
        self.state = QUANTIZING
        self._observed: tuple[Tensor, Tensor] | None = None
        self._create_ranges(spec, shape, device)

    # ---- ranges --------------------------------------------------------------------------------

    def _create_ranges(self, spec: QuantSpec, shape: tuple[int, ...], device) -> None:
        self.spec = spec
        self.range_shape = torch.Size(shape)
        self.calibrated = False

        def empty():
            return torch.full(shape, math.nan, dtype=self.range_dtype, device=device)

        for name in self.learned:
            self.register_parameter(name, nn.Parameter(empty()))
            self.register_buffer(f"initial_{name}", empty())
        for name in self.constants:
            self.register_buffer(name, empty())
        if spec.dynamic:
            # The range comes from the tensor: only its factors are known, and known at once.
            one = torch.ones(shape, dtype=self.range_dtype, device=device)
            self.set_range(-one, one)

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the learned range tensors."""
        return self.spec.learned[1:] if self.spec.fix_min else self.spec.learned

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the constant range tensors; live ones of a dynamic range are not stored."""
        fixed = self.spec.learned[:1] if self.spec.fix_min else ()
        return fixed if self.spec.dynamic else fixed + self.spec.constants

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Makes [low, high] the range and its parameters' first values.

        low, high: of the ranges' shape. Where the range is symmetric, high alone counts.
        """
        spec = self.spec
        first = torch.ops.asymq.parameters_of_range(
            spec.parameterization, low, high, spec.bits, spec.symmetric, spec.sigmoid
        )
        values = {"min": low, "max": high} | dict(zip(spec.learned, first, strict=True))
        for name in (*self.learned, *self.constants):
            getattr(self, name).copy_(values[name])
        for name in self.learned:
            getattr(self, f"initial_{name}").copy_(values[name])
        self.calibrated = True

    def ranges(self, x: Tensor | None = None) -> tuple[Tensor, ...]:
        """The operator's range arguments. Those of a dynamic range come from x."""
        tensors = [getattr(self, name) for name in self.spec.learned]
        if not self.spec.dynamic:
            return (*tensors, *(getattr(self, name) for name in self.spec.constants))
        low, high = self.extrema(x.detach())
        return (*tensors, *((torch.maximum(-low, high),) if self.spec.symmetric else (low, high)))

    def shape_on(self, x: Tensor) -> torch.Size:
        """The ranges' shape when they are applied to x."""
        return self.range_shape

    def extrema(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest element of each range of x, of the ranges' shape and dtype. NaN
        shows in both; without elements they are 0."""
        shape = self.shape_on(x)
        if x.numel() == 0:
            ends = 2 * (x.new_zeros(self.range_shape),)
        elif shape.numel() == 1:
            ends = torch.aminmax(x)
        else:
            # Every axis as (ranges along it, elements of one range).
            sizes = zip(x.shape, shape, strict=True)
            x = x.reshape([part for n, ranges in sizes for part in (ranges, n // ranges)])
            within = tuple(range(1, x.dim(), 2))
            ends = x.amin(within), x.amax(within)
        low, high = (end.reshape(self.range_shape).to(self.range_dtype) for end in ends)
        return low, high

    def range_arguments(self) -> ops.RangeArguments:
        """A static range as operators take it. RuntimeError if uncalibrated."""
        self._need_calibration()
        spec = self.spec
        return ops.RangeArguments(
            spec.parameterization,
            self.ranges(),
            spec.bits,
            spec.symmetric,
            spec.sigmoid,
            spec.eps,
        )

    def scale_offset(self) -> tuple[Tensor, Tensor | None]:
        """Effective scale s and offset z (None if symmetric) of a static range, of its shape."""
        return ops.effective_scale_offset(
            self.spec.parameterization,
            *self.ranges(),
            bits=self.spec.bits,
            symmetric=self.spec.symmetric,
            sigmoid=self.spec.sigmoid,
            eps=self.spec.eps,
        )

    @torch.no_grad()
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The ends of the grid of a static range, s·n and s·p, in float64."""
        scale, offset = self.scale_offset()
        k, scale = self.spec.steps, scale.double()
        if offset is None:
            return -scale * ((k - 1) / 2), scale * ((k - 1) / 2)
        n = offset.double().round()
        return scale * n, scale * (n + k)

    def collapsed(self) -> Tensor:
        """Where the raw scale is at or below eps, so that the guard holds it."""
        return self.scale_offset()[0] <= self.spec.eps

    @torch.no_grad()
    def convert(self, parameterization: str) -> None:
        """Learns the same range under another parameterization, with new parameters.

        Keeps rint(z) and, to a few ulp, s where the range contains 0; warns where it does not.
        ValueError: dynamic ranges, a fixed minimum that the other parameterization does not know.
        """
        spec = self.spec.with_parameterization(parameterization)
        if self.spec.dynamic:
            raise ValueError(
                f"{self.label}: a dynamic range has no values of its own to convert to "
                f"{parameterization}"
            )
        bounds = self.bounds() if self.calibrated else None
        device, learns = self.device, getattr(self, self.learned[-1]).requires_grad
        for name in (*self.learned, *self.constants, *(f"initial_{n}" for n in self.learned)):
            delattr(self, name)
        self._create_ranges(spec, self.range_shape, device)
        for parameter in self.parameters():
            parameter.requires_grad_(learns)
        if bounds is None:
            return
        low, high = bounds
        if spec.symmetric:
            # The grid ends at s·(k - 1)/2, the range at s·k/2.
            high = high * (spec.steps / (spec.steps - 1))
            low = -high
        elif bool(((low > 0) | (high < 0)).any()):
            warnings.warn(
                f"{self.label}: the range does not contain 0; {parameterization} keeps it only as "
                "well as float32 allows",
                stacklevel=2,
            )
        if spec.sigmoid:
            # The first values are σ(4) of the constants.
            first = 1 / (1 + math.exp(-4.0))
            low, high = low / first, high / first
        self.set_range(low, high)

    @property
    def device(self) -> torch.device:
        return getattr(self, self.spec.learned[-1]).device

    # ---- the module ----------------------------------------------------------------------------

    @property
    def label(self) -> str:
        return self.name or type(self).__name__

    def forward(self, x: Tensor) -> Tensor:
        if self.state == QUANTIZING:
            return self.fake_quantize(x)
        if self.state == OBSERVING:
            self._observe(x)
        return x

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x on the grid of the present range, whatever the state. RuntimeError if uncalibrated."""
        self._need_calibration()
        spec, shape = self.spec, self.shape_on(x)
        ranges = self.ranges(x)
        if shape != self.range_shape:
            ranges = [tensor.view(shape) for tensor in ranges]
        options = {"sigmoid": True} if spec.sigmoid else {}
        function = getattr(self.functions, spec.operator)
        return function(x, *ranges, bits=spec.bits, eps=spec.eps, **options)

    def _need_calibration(self) -> None:
        if not self.calibrated:
            raise RuntimeError(
                f"{self.label}: its range is not set; calibrate the model first "
                "(asymq.calibrate), or load a calibrated state"
            )

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        low, high = self.extrema(x)
        if self._observed is not None:
            low = torch.minimum(low, self._observed[0])
            high = torch.maximum(high, self._observed[1])
        self._observed = low, high

    def start_observing(self) -> None:
        self.state, self._observed = OBSERVING, None

    def take_observed(self) -> tuple[Tensor, Tensor] | None:
        """The extrema seen since start_observing, of the ranges' shape; None: no data."""
        observed, self._observed = self._observed, None
        return observed

    def range_tensors(self) -> dict[str, Tensor]:
        """All range tensors by name: learned, constant and first values."""
        return {**self._parameters, **self._buffers}

    def extra_repr(self) -> str:
        spec = self.spec
        parts = [f"{spec.bits} bits", *(["symmetric"] if spec.symmetric else [])]
        parts += [str(spec.granularity), spec.parameterization]
        parts += [option for option in ("sigmoid", "dynamic", "fix_min") if getattr(spec, option)]
        parts += [describe_range(self)]
        return ", ".join(parts + ([self.state] if self.state != QUANTIZING else []))

    def _apply(self, fn, recurse=True):
        """Ranges move with the module but keep their dtype."""

        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    # ---- state_dict ----------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Spec and calibrated state as JSON in a uint8 tensor: a state_dict holds tensors alone."""
        state = {"spec": self.spec.to_dict(), "calibrated": self.calibrated}
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        self.calibrated = _decode(state)["calibrated"]

    def check_state(self, state_dict: dict, prefix: str) -> bool:
        """Whether `state_dict` has this quantizer's state under `prefix`. RuntimeError if what it
        has belongs to a quantizer of another spec."""
        own = {f"{prefix}{key}" for key in (*self._parameters, *self._buffers, "_extra_state")}
        found = {key for key in state_dict if key.startswith(prefix)}
        if not found:
            return False
        extra = state_dict.get(f"{prefix}_extra_state")
        saved = None if extra is None else QuantSpec.from_dict(_decode(extra)["spec"])
        if saved is not None and saved != self.spec:
            raise RuntimeError(
                f"{prefix.removesuffix('.') or self.label}: the state is of another quantizer: it "
                f"has {saved}, this one {self.spec}"
            )
        shapes = {key: tuple(state_dict[key].shape) for key in found if not key.endswith("_state")}
        wrong = {key: shape for key, shape in shapes.items() if shape != tuple(self.range_shape)}
        if found != own or wrong:
            raise RuntimeError(
                f"{prefix.removesuffix('.') or self.label}: the state does not fit: it needs "
                f"{sorted(own)} of shape {tuple(self.range_shape)}, got {sorted(found)}"
                + (f" of shapes {wrong}" if wrong else "")
            )
        return True

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        # Without any range: a float checkpoint, whose weights are all it has to bring.
        if self.check_state(state_dict, prefix):
            super()._load_from_state_dict(state_dict, prefix, *arguments)


def _decode(state: Tensor) -> dict:
    return json.loads(bytes(state.cpu().tolist()))


class QuantAct(Quantizer):
    """Quantizes an activation, of any shape.

    spec: what it is. channels: size of the axis that a per-channel or per-group granularity names
    (needed there; the last axis by default). Ranges have shape [1], [channels] or [groups] and are
    float32, or with dtype float64, for float64 activations alone.
    """

    kind = "activation"

    def __init__(
        self,
        spec: QuantSpec,
        channels: int | None = None,
        *,
        name: str = "",
        device=None,
        dtype: torch.dtype = torch.float32,
    ):
        granularity = spec.granularity
        if isinstance(granularity, PerTensor):
            ranges = 1
        elif channels is None:
            raise ValueError(
                f"{name or 'QuantAct'}: {granularity} needs an axis of known size (channels)"
            )
        elif isinstance(granularity, PerGroup):
            ranges = _groups(name or "QuantAct", channels, granularity.size)
        else:
            ranges = channels
        super().__init__(spec, (ranges,), name, device, dtype)
        self.channels = channels

    @classmethod
    def on_last_axis(
        cls, spec: QuantSpec, channels: int | None, name: str = "", device=None
    ) -> QuantAct:
        """Where only the size of the last axis is known; None: not even that."""
        axis = getattr(spec.granularity, "axis", None)
        if axis not in (None, -1):
            raise ValueError(
                f"{name or cls.__name__}: {spec.granularity} names an axis whose size the tensors "
                "decide; ranges must exist before: use the last axis (None)"
            )
        return cls(spec, channels, name=name, device=device)

    def shape_on(self, x: Tensor) -> torch.Size:
        if isinstance(self.spec.granularity, PerTensor):
            return self.range_shape
        axis = self.spec.granularity.axis
        axis = _axis(self.label, -1 if axis is None else axis, x.dim())
        if x.shape[axis] != self.channels:
            raise RuntimeError(
                f"{self.label}: axis {axis} of the activation must have {self.channels} channels, "
                f"got shape {list(x.shape)}"
            )
        shape = [1] * x.dim()
        shape[axis] = self.range_shape[0]
        return torch.Size(shape)


class WeightQuantizer(Quantizer):
    """Quantizes a weight. Modules with tied weights share one.

    shape: the weight's. channel_axis, reduction_axis: where a granularity without an axis applies.
    Ranges have the shape [1] or as many dimensions as the weight.
    """

    kind = "weight"

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        *,
        channel_axis: int = 0,
        reduction_axis: int = -1,
        name: str = "",
        device=None,
    ):
        label, granularity = name or type(self).__name__, spec.granularity
        ranges = (1,)
        if isinstance(granularity, PerChannel):
            axis = channel_axis if granularity.axis is None else granularity.axis
            axis = _axis(label, axis, len(shape))
            ranges = tuple(size if i == axis else 1 for i, size in enumerate(shape))
        elif isinstance(granularity, PerGroup):
            axis = reduction_axis if granularity.axis is None else granularity.axis
            axis = _axis(label, axis, len(shape))
            groups = _groups(label, shape[axis], granularity.size)
            ranges = (*shape[:axis], groups, *shape[axis + 1 :])
        super().__init__(spec, ranges, name, device)
        self.weight_shape = torch.Size(shape)
        # While `keep_result` holds, all calls return the first call's result.
        self.keep_result = False
        self._kept: Tensor | None = None

    def share_within_forward(self, begin: bool) -> None:
        """Between begin and end one result serves all modules that share the weight; outside, every
        call quantizes, so that nothing outlives an optimizer step."""
        self.keep_result, self._kept = begin, None

    def shape_on(self, x: Tensor) -> torch.Size:
        if x.shape != self.weight_shape:
            raise RuntimeError(
                f"{self.label}: its weight had the shape {list(self.weight_shape)}, now it has "
                f"{list(x.shape)}: resize a model before quantizing it"
            )
        return self.range_shape

    def forward(self, weight: Tensor) -> Tensor:
        if not self.keep_result or self.state != QUANTIZING:
            return super().forward(weight)
        if self._kept is None:
            self._kept = super().forward(weight)
        return self._kept


class NormWeightQuantizer(WeightQuantizer):
    """Quantizes the weight of a normalization layer, which is calibrated like an activation."""

    kind = "norm_weight"


def is_fusible(quantizer: nn.Module | None) -> bool:
    """Whether a kernel that does more than quantize does what this quantizer would do now."""
    return (
        isinstance(quantizer, Quantizer)
        and quantizer.state == QUANTIZING
        and not quantizer.spec.dynamic
        and quantizer.range_shape.numel() == 1
        and quantizer.functions is ops
    )


def describe_range(quantizer: Quantizer) -> str:
    """The present range in a few characters: its ends, or the extreme ends of all its ranges."""
    if quantizer.spec.dynamic:
        return "dynamic range"
    if not quantizer.calibrated:
        return "uncalibrated"
    low, high = quantizer.bounds()
    ends = f"[{low.min().item():.4g}, {high.max().item():.4g}]"
    return ends if low.numel() == 1 else f"{low.numel()} ranges within {ends}"


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer) of every quantizer of a model, a shared one once."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def enable_quantizers(model: nn.Module) -> None:
    """Lets every quantizer quantize (their state after ``prepare``)."""
    for _, quantizer in named_quantizers(model):
        quantizer.state = QUANTIZING


def disable_quantizers(model: nn.Module) -> None:
    """Turns every quantizer off: the model computes in float, its ranges stay as they are."""
    for _, quantizer in named_quantizers(model):
        quantizer.state = OFF


def convert_parameterization(model: nn.Module, to: str) -> None:
    """Learns the present ranges of a model or module under another parameterization.

    to: "scale_offset", "min_max", "beta_gamma", "beta_gamma_sigmoid" or "kscale_koffset" (whose
    symmetric counterpart is the scale). The range parameters are new ones: make the optimizer after
    this. ValueError, before anything is changed: unknown names, dynamic ranges, a fixed minimum
    that the parameterization does not know, no quantizer.
    """
    quantizers = list(named_quantizers(model))
    if not quantizers:
        raise ValueError("asymq.convert_parameterization: the model has no quantizers")
    for name, quantizer in quantizers:
        if quantizer.spec.dynamic:
            raise ValueError(f"asymq.convert_parameterization: {name} has a dynamic range")
        try:
            quantizer.spec.with_parameterization(to)
        except ValueError as error:
            raise ValueError(f"asymq.convert_parameterization: {name}: {error}") from None
    for _, quantizer in quantizers:
        quantizer.convert(to)
