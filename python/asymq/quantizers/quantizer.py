"""A quantizer as a module: a spec, its range tensors, and a state.

Words: *range tensors* bear the names of the operators' arguments; learned ones are parameters,
constant ones buffers, and ``initial_<name>`` keeps the value that calibration (or a conversion)
gave a learned one, which the step rules need. All are NaN until then, have their final shape
(`range_shape`) from the start, and keep their dtype whatever the module is cast to. *Extrema* are
the smallest and largest elements of a tensor, *bounds* the ends of the grid.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from asymq import ops
from asymq.quantizers import functions
from asymq.quantizers.observers import Observer
from asymq.quantizers.sharing import once, provided, results
from asymq.quantizers.spec import QuantSpec

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PICKLE_OF_0_1 = (
    "asymq: this pickle was made by asymq 0.1, whose classes have changed: open a folder of "
    "asymq.save with asymq.load, or its state_dict with load_state_dict"
)
QUANTIZING, OBSERVING, OFF = STATES = ("quantizing", "observing", "off")


class Quantizer(nn.Module):
    """What activations' and weights' quantizers share.

    ``state`` is "quantizing", "observing" (records extrema, or what `start_observing` is given does
    with x, passes x on) or "off" (passes x on).
    Quantizing before calibration raises RuntimeError.
    """

    kind: str
    spec: QuantSpec
    range_shape: torch.Size
    calibrated: bool
    live: bool  # whether the range comes from the tensor that is quantized

    def __init__(
        self,
        spec: QuantSpec,
        shape: torch.Size,
        name: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.name = name
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{self.label}: ranges must be float32 or float64, got {dtype}")
        self.range_dtype = dtype
        self._state = QUANTIZING
        # Whether a forward has come here: what none does is calibrated and learned for nothing.
        self.reached = False
        # How many modules give it one and the same tensor: one forward quantizes that once.
        self.users = 1
        self._observed: Observer | None = None
        self._observe: Callable[[Tensor], None] | None = None  # instead of that one
        # The prefix under which a state has it last, by which its other names know that.
        self._written_as: str | None = None
        self._create_ranges(spec, shape, device)

    # ---- ranges --------------------------------------------------------------------------------

    def _create_ranges(self, spec: QuantSpec, shape: torch.Size, device) -> None:
        self.spec = spec
        self.live = spec.dynamic
        self.range_shape = shape
        self.calibrated = False
        # Of the call of the operator, made once: it is made for every tensor.
        self._function = spec.function
        self._arguments = spec.learnable if self.live else spec.learnable + spec.constant
        self._options: dict[str, Any] = {"bits": spec.bits, "eps": spec.eps}
        self._options |= spec.granularity.options()
        if spec.link != "identity":
            self._options["link"] = spec.link
        if spec.full_range:
            self._options["full_range"] = True

        def empty():
            return torch.full(shape, math.nan, dtype=self.range_dtype, device=device)

        for name in self.learned:
            self.register_parameter(name, nn.Parameter(empty(), requires_grad=spec.learn))
            self.register_buffer(f"initial_{name}", empty())
        for name in self.constants:
            self.register_buffer(name, empty())
        if self.live:
            self.set_factors()

    def set_factors(self) -> None:
        """First values of a live range, of which only the factors are known, and known at once."""
        one = torch.ones(self.range_shape, dtype=self.range_dtype, device=self.device)
        self.set_range(-one, one)

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the learned range tensors."""
        return self.spec.learnable[1:] if self.spec.fix_min else self.spec.learnable

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the constant range tensors; live ends are not stored."""
        fixed = self.spec.learnable[:1] if self.spec.fix_min else ()
        return fixed if self.live else fixed + self.spec.constant

    @property
    def device(self) -> torch.device:
        return getattr(self, self.spec.learnable[-1]).device

    def range_tensors(self) -> dict[str, Tensor]:
        """All range tensors by name: learned, constant and first values."""
        tensors = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @torch.no_grad()
    def set_range(self, low: Tensor | float, high: Tensor | float) -> None:
        """Makes [low, high] the range and its parameters' first values.

        low, high: of the ranges' shape, or numbers for all. Where the range is symmetric, high
        alone counts. RuntimeError: the ranges are split among processes.
        """
        self.need_whole()
        low, high = (
            torch.as_tensor(end, dtype=self.range_dtype, device=self.device)
            if isinstance(end, (int, float))
            else end
            for end in (low, high)
        )
        spec = self.spec
        first = torch.ops.asymq.parameters_of_range(
            spec.parameterization,
            low,
            high,
            spec.bits,
            spec.symmetric,
            spec.sigmoid,
            spec.full_range,
            spec.link,
        )
        values = {"min": low, "max": high} | dict(zip(spec.learnable, first, strict=True))
        for name in (*self.learned, *self.constants):
            getattr(self, name).copy_(values[name])
        for name in self.learned:
            getattr(self, f"initial_{name}").copy_(values[name])
        self.calibrated = True

    @property
    def typical_end(self) -> float:
        """Of the range of data that say nothing of it."""
        return 1.0

    @torch.no_grad()
    def set_range_of_data(self, low: Tensor, high: Tensor, force_zero: bool) -> bool:
        """Makes what the extrema of data say the range, and returns whether they say anything.

        Zero is put into an asymmetric range if force_zero, else where all data are one value. A
        range without width, such as that of zeros, gets the widest of its tensor's, or where none
        has a width, `typical_end` on either side of 0.
        """
        if self.live:
            return True
        widest = torch.maximum(low.abs(), high.abs()).amax().item()
        low, high, without_width = torch.ops.asymq.range_of_extrema(
            low,
            high,
            self.spec.bits,
            self.spec.symmetric,
            force_zero,
            widest or self.typical_end,
            self.spec.eps,
            self.spec.full_range,
        )
        self.set_range(low, high)
        return not bool(without_width.all())

    def arguments(self, x: Tensor | None = None) -> tuple[Tensor, ...]:
        """The range tensors as the operator takes them. Those of a live range come from x, unless
        the operator takes them from there itself."""
        # A module's attributes take longer to find than a small tensor to quantize.
        learned: dict[str, Any] = self._parameters
        constant: dict[str, Any] = self._buffers
        tensors = tuple([learned[n] if n in learned else constant[n] for n in self._arguments])
        if not self.live or self.spec.granularity.of_tokens:
            return tensors
        assert x is not None
        low, high = self.extrema(x.detach())
        return (*tensors, *((torch.maximum(-low, high),) if self.spec.symmetric else (low, high)))

    def scale_of_gradient(self, x: Tensor) -> float:
        """What the gradients of the range's parameters are multiplied by where x is quantized."""
        if self.spec.gradient_scale is None:
            return 1.0
        return self.spec.scale_of_gradient(self.elements_of_sample(x) // self.range_shape.numel())

    def elements_of_sample(self, x: Tensor) -> int:
        """How many elements the ranges' parameters share, those of all batches alike."""
        return x.shape[1:].numel()

    def range_arguments(self, x: Tensor) -> ops.RangeArguments:
        """As operators take it that do more than quantize: a stored range, or that of each token.

        x: of the shape that is quantized, its samples along the first axis. RuntimeError if
        uncalibrated.
        """
        if not self.reached:
            self._reach()
        if not self.calibrated:
            self._refuse()
        spec = self.spec
        return ops.RangeArguments(
            spec.parameterization,
            self.arguments(),
            spec.bits,
            spec.symmetric,
            spec.sigmoid,
            spec.eps,
            spec.full_range,
            token=self.live,
            link=spec.link,
            gradient_scale=self.scale_of_gradient(x),
        )

    def shape_on(self, x: Tensor) -> torch.Size:
        """The ranges' shape when they are applied to x."""
        return self.range_shape

    def extrema(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest element of each range of x, of the ranges' shape and dtype. NaN
        shows in both; without elements they are 0."""
        shape = self.shape_on(x)
        if x.numel() == 0:
            zeros = x.new_zeros(self.range_shape)
            ends = zeros, zeros
        elif shape.numel() == 1:
            ends = torch.aminmax(x)
        else:
            x, axes = _blocks(x, shape)
            ends = x.amin(axes[1::2]), x.amax(axes[1::2])
        return self.of_ranges(*ends)

    def rows(self, x: Tensor) -> Tensor:
        """x as [ranges, elements of each], in the order of the ranges."""
        shape = self.shape_on(x)
        if shape.numel() == 1:
            return x.reshape(1, -1)
        x, axes = _blocks(x, shape)
        return x.permute(*axes[::2], *axes[1::2]).reshape(shape.numel(), -1)

    def scale_offset(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Effective scale s and offset z (None if symmetric) of a stored range, or of the live one
        of x, of its shape."""
        return ops.effective_scale_offset(
            self.spec.parameterization,
            *self.arguments(x),
            symmetric=self.spec.symmetric,
            **self._options,
        )

    @torch.no_grad()
    def grids(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x as rows that have a grid each, with their effective scale and offset (None if
        symmetric), both [rows, 1]; of each token's range, too."""
        if not self.spec.granularity.of_tokens:
            scale, offset = self.scale_offset(x)
            return (
                self.rows(x),
                scale.reshape(-1, 1),
                None if offset is None else offset.reshape(-1, 1),
            )
        options = dict(self._options)
        rows = x.reshape(-1, options.pop("group") or x.shape[-1])
        low, high = (end.to(self.range_dtype) for end in torch.aminmax(rows, dim=1, keepdim=True))
        low, high = low.clamp(max=0), high.clamp(min=0)
        factors = (factor.repeat(len(rows) // len(factor))[:, None] for factor in self.arguments())
        live = (torch.maximum(-low, high),) if self.spec.symmetric else (low, high)
        scale, offset = ops.effective_scale_offset(
            self.spec.parameterization, *factors, *live, symmetric=self.spec.symmetric, **options
        )
        return rows, scale, offset

    @torch.no_grad()
    def bounds(self, initial: bool = False) -> tuple[Tensor, Tensor]:
        """The ends of the grid of a stored range, s·n and s·p, in float64; initial: with the first
        values of what is learned."""
        tensors = self.range_tensors()
        ranges = [
            tensors.get(f"initial_{name}", tensors[name]) if initial else tensors[name]
            for name in self._arguments
        ]
        scale, offset = ops.effective_scale_offset(
            self.spec.parameterization, *ranges, symmetric=self.spec.symmetric, **self._options
        )
        scale = scale.double()
        if offset is None:
            lowest, highest = self.spec.codes
            return scale * lowest, scale * highest
        n = offset.double().round()
        return scale * n, scale * (n + self.spec.steps)

    def collapsed(self) -> Tensor | None:
        """Where the raw scale is at or below eps, so that the guard holds it; None: there is no
        range to look at."""
        if self.live or not self.calibrated:
            return None
        return self.scale_offset()[0] <= self.spec.eps

    def describe_range(self) -> str:
        """The present range in a few characters: its ends, or the extreme ends of all ranges."""
        if self.live:
            factors = (f"{name} {_spread(getattr(self, name))}" for name in self.learned)
            return ", ".join(["dynamic range", *factors])
        if not self.calibrated:
            return "uncalibrated"
        low, high = self.bounds()
        ends = f"[{low.min().item():.4g}, {high.max().item():.4g}]"
        return ends if low.numel() == 1 else f"{low.numel()} ranges within {ends}"

    def need_convertible(self, parameterization: str) -> QuantSpec:
        """The spec under another parameterization. ValueError: a live range, a fixed minimum that
        the parameterization does not know."""
        if self.live:
            raise ValueError(
                "has a dynamic range: there are no values of its own to convert to "
                f"{parameterization}"
            )
        return self.spec.with_parameterization(parameterization)

    @torch.no_grad()
    def convert(self, parameterization: str) -> None:
        """Learns the same range under another parameterization, with new parameters.

        Keeps rint(z) and, to a few ulp, s where the range contains 0; warns where it does not.
        ValueError, before anything is changed: see `need_convertible`.
        """
        spec = self.need_convertible(parameterization)
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
            # The grid ends at s·p, the range at s·k/2, in full range at -s·n.
            high = high * (spec.end_in_steps / spec.codes[1])
            low = -high
        elif bool(((low > 0) | (high < 0)).any()):
            warnings.warn(
                f"{self.label}: the range does not contain 0; {parameterization} keeps it only as "
                "well as float32 allows",
                stacklevel=2,
            )
        if spec.sigmoid:
            # The first values are σ(4) of the constants, under every other link the constants.
            first = 1 / (1 + math.exp(-4.0))
            low, high = low / first, high / first
        self.set_range(low, high)

    # ---- the module ----------------------------------------------------------------------------

    @property
    def label(self) -> str:
        return self.name or type(self).__name__

    @property
    def state(self) -> str:
        return self._state

    @state.setter
    def state(self, value: str) -> None:
        if value not in STATES:
            raise ValueError(
                f"{self.label}: state must be one of {', '.join(STATES)}, got {value!r}"
            )
        self._state = value

    def forward(self, x: Tensor) -> Tensor:
        if self._state == QUANTIZING:
            if self.users > 1:
                return once(self, self.uses, x, self.range_tensors, self.fake_quantize)
            return self.fake_quantize(x)
        if not self.reached:
            self._reach()
        if self._state == OBSERVING:
            return once(self, self.uses, x, dict, self._show) if self.users > 1 else self._show(x)
        return x

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x on the grid of the present range, whatever the state. RuntimeError if uncalibrated."""
        if not self.reached:
            self._reach()
        if not self.calibrated:
            self._refuse()
        ranges, shape = self.arguments(x), self.shape_on(x)
        if shape != self.range_shape:
            ranges = tuple(tensor.view(shape) for tensor in ranges)
        function = getattr(functions.namespace(), self._function)
        return function(x, *ranges, **self._options_on(x))

    def _options_on(self, x: Tensor) -> dict[str, Any]:
        """What the operator is called with that quantizes x."""
        if self.spec.gradient_scale is None:
            return self._options
        return {**self._options, "gradient_scale": self.scale_of_gradient(x)}

    @property
    def uses(self) -> float:
        """How often a forward needs the same result, which is kept so long."""
        return self.users

    @property
    def fusible(self) -> bool:
        """Whether a kernel that does more than quantize does what this quantizer would do now, and
        nobody can notice that it is not called. Where it is live, a kernel that knows tokens."""
        return (
            self._state == QUANTIZING
            and self.range_shape.numel() == 1
            and (not self.live or self.spec.granularity.of_whole_tokens)
            and functions.may_fuse()
            and is_unobserved(self)
        )

    @property
    def shares(self) -> bool:
        """Whether it quantizes a tensor once for several users in the forward that is going on."""
        return self.users > 1 and results() is not None

    def provided(self, x: Tensor) -> AbstractContextManager[None]:
        """Within it, this quantizer, which `shares`, returns x itself to all of its users: it is
        the result of a kernel that did what this quantizer does."""
        return provided(self, self.uses, x, self.range_tensors)

    def _reach(self) -> None:
        if not torch.compiler.is_compiling():
            self.reached = True

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            f"{self.label}: its range is not set; calibrate the model first (asymq.calibrate), or "
            "load a calibrated state"
        )

    @torch.no_grad()
    def _show(self, x: Tensor) -> Tensor:
        if self._observe is not None:
            self._observe(x)
        else:
            self._observed = self._observed or Observer(self.spec)
            self._observed.see(self.rows(x))
        return x

    def start_observing(self, observe: Callable[[Tensor], None] | None = None) -> None:
        """From now on gives what passes to `observe`, by default records the extrema. What several
        users give it in one forward counts once."""
        self.state, self._observe, self._observed = OBSERVING, observe, None

    def take_observed(self) -> tuple[Tensor, Tensor] | None:
        """The extrema recorded since start_observing, of the ranges' shape; None: no data."""
        extrema = None if self._observed is None else self._observed.extrema()
        self._observe = self._observed = None
        return None if extrema is None else self.of_ranges(*extrema)

    def of_ranges(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """One value for each of the `rows`, in the ranges' shape and dtype."""
        low, high = (end.reshape(self.range_shape).to(self.range_dtype) for end in (low, high))
        return low, high

    def need_whole(self) -> None:
        """RuntimeError where FSDP2 has split the range tensors among processes."""
        if any(is_split(tensor) for tensor in self._parameters.values()):
            raise RuntimeError(
                f"{self.label}: its ranges are split among processes, and cannot be set there: "
                "shard the model with asymq.shard, which leaves them whole, or set them before"
            )

    def extra_repr(self) -> str:
        spec = self.spec
        parts = [f"{spec.bits} bits", *(["symmetric"] if spec.symmetric else [])]
        parts += [repr(spec.granularity), spec.parameterization, *spec.options]
        parts += [self.describe_range()]
        return ", ".join(parts + ([self.state] if self.state != QUANTIZING else []))

    def _apply(self, fn, recurse=True):
        """Ranges move with the module but keep their dtype."""

        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def __setstate__(self, state) -> None:
        if "_state" not in state:
            raise RuntimeError(PICKLE_OF_0_1)
        super().__setstate__(state)
        self._written_as = None  # a copy is in no state yet

    # ---- state_dict ----------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """{"spec": ..., "calibrated": true or false} as JSON in a uint8 tensor: a state_dict holds
        tensors alone. A blank after true gives both one length, so that a state fits into any model
        of the spec; version 0.1 wrote none, and is read, too."""
        longest = json.dumps({"spec": self.spec.to_dict(), "calibrated": False})
        state = json.dumps({"spec": self.spec.to_dict(), "calibrated": self.calibrated})
        encoded = bytearray(state.ljust(len(longest)).encode())
        return torch.frombuffer(encoded, dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        self.calibrated = _decode(state, self.label)["calibrated"]

    def check_state(self, state_dict: dict, prefix: str) -> bool:
        """Whether `state_dict` has this quantizer's state under `prefix`. RuntimeError if what it
        has belongs to a quantizer of another spec."""
        own = {f"{prefix}{key}" for key in (*self._parameters, *self._buffers, "_extra_state")}
        found = {key for key in state_dict if key.startswith(prefix)}
        if not found:
            return False
        label = prefix.removesuffix(".") or self.label
        extra = state_dict.get(f"{prefix}_extra_state")
        saved = None if extra is None else QuantSpec.from_dict(_decode(extra, label)["spec"])
        if saved is not None and saved != self.spec:
            raise RuntimeError(
                f"{label}: the state is of another quantizer: it has {saved}, this one {self.spec}"
            )
        shapes = {key: tuple(state_dict[key].shape) for key in found if not key.endswith("_state")}
        wrong = {key: shape for key, shape in shapes.items() if shape != tuple(self.range_shape)}
        if found != own or wrong:
            raise RuntimeError(
                f"{label}: the state does not fit: it needs "
                f"{sorted(own)} of shape {tuple(self.range_shape)}, got {sorted(found)}"
                + (f" of shapes {wrong}" if wrong else "")
            )
        return True

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        # Without any range: a float checkpoint, whose weights are all it has to bring; or another
        # user of this quantizer, which is written once.
        if self.check_state(state_dict, prefix):
            super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Once, under its first name: a quantizer is a submodule of each of its users."""
        written = self._written_as
        if written is not None and written != prefix and f"{written}_extra_state" in destination:
            return
        self._written_as = prefix
        super()._save_to_state_dict(destination, prefix, keep_vars)


def _blocks(x: Tensor, shape: torch.Size) -> tuple[Tensor, tuple[int, ...]]:
    """Every axis of x as (ranges along it, elements of one range), and the axes."""
    sizes = zip(x.shape, shape, strict=True)
    x = x.reshape([part for n, ranges in sizes for part in (ranges, n // ranges)])
    return x, tuple(range(x.dim()))


def _spread(values: Tensor) -> str:
    """One value, or the least and the largest, in a few characters."""
    if values.is_meta:
        return "without a value"
    low, high = (f"{end.item():.4g}" for end in torch.aminmax(values.detach()))
    return low if low == high else f"{low} to {high}"


def _decode(state: Tensor, label: str) -> dict:
    """Of a state that may have been cast, or averaged with equal ones."""
    try:
        return json.loads(bytes(state.cpu().round().to(torch.uint8).tolist()))
    except (ValueError, RuntimeError):
        raise RuntimeError(
            f"{label}: its _extra_state, a JSON text in bytes, is damaged; take that of the model "
            "that the state was made of"
        ) from None


def is_split(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether FSDP2 has split it among processes."""
    return hasattr(tensor, "full_tensor")


def is_unobserved(module: nn.Module) -> bool:
    """Whether nobody can notice if a module's work is done without calling it: it has no hooks, and
    nobody has replaced its forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or _has_any_global_hook()
    )


def apply(quantizer: nn.Module | None, x: Tensor) -> Tensor:
    """x, quantized where there is a quantizer."""
    return x if quantizer is None else quantizer(x)


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

    to: "scale_offset", "min_max", "beta_gamma", "kscale_koffset" (whose symmetric counterpart is
    the scale), or with a link "beta_gamma_sigmoid", "beta_gamma_exp", "beta_gamma_softplus" or
    "beta_gamma_clamp". The range parameters are new ones: make the optimizer after this.
    ValueError, before anything is changed: unknown names, dynamic ranges, a fixed minimum that the
    parameterization does not know, no quantizer.
    """
    quantizers = list(named_quantizers(model))
    if not quantizers:
        raise ValueError("asymq.convert_parameterization: the model has no quantizers")
    for name, quantizer in quantizers:
        try:
            quantizer.need_convertible(to)
        except ValueError as error:
            raise ValueError(f"asymq.convert_parameterization: {name}: {error}") from None
    for _, quantizer in quantizers:
        quantizer.convert(to)
