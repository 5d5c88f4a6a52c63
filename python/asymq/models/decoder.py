"""Layers and MLPs of decoders, whatever their family, by the steps of their forwards."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from inspect import Parameter, signature
from itertools import permutations
from typing import Any, NamedTuple

from torch import Tensor, nn

from asymq.layers import Quantized, QuantLinear, fused
from asymq.layers.norm import normalize_into
from asymq.models.steps import INPUT, call_of, chained, product_of, read, readers
from asymq.quantizers import Quantizer, apply, is_unobserved


class Layer(NamedTuple):
    """steps: names of submodules, and for a sum that of its quantizer. attention: which of the
    submodules is given the layer's arguments `passed`, and what else comes by keyword."""

    steps: tuple[str, ...]
    attention: str
    passed: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(step for step in self.steps if step not in QuantDecoderLayer.sites)


def layer_of(cls: type[nn.Module]) -> Layer | None:
    """The decoder's layer that a class is: a sum behind attention and one behind the MLP, each of
    what the sum before it gave and a chain of submodules; None: it is something else."""
    forward = read(cls)
    if forward.result is None or len(forward.passed) != 1:
        return None
    if forward.steps.count("+") != 2 or forward.steps[-1] != "+":
        return None
    ((attention, passed),) = forward.passed.items()
    # Attention alone returns something beside its output.
    if forward.result.count("[0]") != forward.result.count(f"{attention}("):
        return None
    if forward.result.replace("[0]", "") != chained(forward.steps):
        return None
    middle = forward.steps.index("+")
    first, second = forward.steps[:middle], forward.steps[middle + 1 : -1]
    if attention not in first or not second:
        return None
    steps = (*first, "attention_sum_quantizer", *second, "mlp_sum_quantizer")
    return Layer(steps, attention, passed)


class QuantDecoderLayer(Quantized):
    """A layer of a decoder that quantizes both residual sums."""

    sites = ("attention_sum_quantizer", "mlp_sum_quantizer")
    quantizes_ahead = True
    attention_sum_quantizer: Quantizer | None
    mlp_sum_quantizer: Quantizer | None

    @classmethod
    def own_members(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        layer = layer_of(float_class)
        assert layer is not None
        steps, attention, passed = layer
        _, _, *names = parameters = signature(float_class.forward).parameters
        values = {name: parameters[name].default for name in passed}
        defaults = {name: v for name, v in values.items() if v is not Parameter.empty}
        dropped = set(names) - set(passed)  # the layer's own arguments

        @functools.wraps(float_class.forward)
        def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
            kwargs = defaults | kwargs | dict(zip(names, args, strict=False))
            kwargs = {name: value for name, value in kwargs.items() if name not in dropped}
            x = residual = hidden_states
            # Within which the next step may be given what its layers' quantizer has quantized.
            quantized: AbstractContextManager = nullcontext()
            for step, following in zip(steps, (*steps[1:], None), strict=True):
                if step in cls.sites:
                    x = residual = apply(getattr(self, step), residual + x)
                    continue
                module = getattr(self, step)
                quantizer = None if following is None else shared_input(getattr(self, following))
                if quantizer is not None:
                    y = normalize_into(module, x, quantizer)
                    if y is not None:
                        x, quantized = y, quantizer.provided(y)
                        continue
                with quantized:
                    x = module(x, **kwargs)[0] if step == attention else module(x)
                quantized = nullcontext()
            return x

        return {"forward": forward}


def shared_input(module: nn.Module | None) -> Quantizer | None:
    """The quantizer that a module's layers share, of what the module is given; None: there is none,
    something else in the module reads that too, or somebody would notice if they were given what
    is quantized already."""
    if module is None or not is_unobserved(module):
        return None
    cls = module.float_class if isinstance(module, Quantized) else type(module)
    layers = [getattr(module, name) for name in readers(cls)]
    if not layers or not all(fused.may_skip(layer, QuantLinear) for layer in layers):
        return None
    quantizer = layers[0].input_quantizer
    if quantizer is None or any(layer.input_quantizer is not quantizer for layer in layers):
        return None
    fits = quantizer.users == len(layers) and quantizer.shares and quantizer.fusible
    return quantizer if fits else None


class GatedMLP(NamedTuple):
    """Names of submodules: down(act(gate(x)) * up(x)). up "": gate returns both halves."""

    gate: str
    act: str
    up: str
    down: str


def gated_mlp_of(cls: type[nn.Module]) -> GatedMLP | None:
    """The gated MLP that a class is; None: it is none."""
    forward = read(cls)
    *front, down = [step for step in forward.steps if step != "*"] or [""]
    if len(front) == 2:
        front.append("")
    for gate, act, up in permutations(front, 3):
        given = call_of(gate, INPUT)
        if up:
            product = product_of(call_of(act, given), call_of(up, INPUT))
        else:
            product = product_of(call_of(act, f"{given}[0]"), f"{given}[1]")
        if forward.result == call_of(down, product):
            return GatedMLP(gate, act, up, down)
    return None


class QuantGatedMLP(Quantized):
    """An MLP that quantizes the product of its two halves."""

    sites = ("product_quantizer",)
    quantizes_ahead = True
    product_quantizer: Quantizer | None

    @classmethod
    def own_members(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        names = gated_mlp_of(float_class)
        assert names is not None

        @functools.wraps(float_class.forward)
        def forward(self, x: Tensor) -> Tensor:
            gate = getattr(self, names.gate)(x)
            if names.up:
                up = getattr(self, names.up)(x)
            else:
                gate, up = gate.chunk(2, dim=-1)
            # What quantizes the product, and what is left of `down`.
            after, down = self.product_quantizer, getattr(self, names.down)
            if after is None and fused.may_skip(down, QuantLinear):
                after, down = down.input_quantizer, down.forward_quantized
            return down(fused.glu(gate, up, getattr(self, names.act), after))

        return {"forward": forward}
