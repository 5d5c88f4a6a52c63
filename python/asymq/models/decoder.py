"""Layers and MLPs of decoders, whatever their family, by the steps of their forwards."""

from __future__ import annotations

import functools
from inspect import Parameter, signature
from itertools import permutations
from typing import Any, NamedTuple

from torch import Tensor, nn

from asymq.layers import Quantized
from asymq.models.steps import INPUT, call_of, chained, product_of, read
from asymq.quantizers import Quantizer, apply


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
            for step in steps:
                if step in cls.sites:
                    x = residual = apply(getattr(self, step), residual + x)
                elif step == attention:
                    x = getattr(self, step)(x, **kwargs)[0]
                else:
                    x = getattr(self, step)(x)
            return x

        return {"forward": forward}


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
    product_quantizer: Quantizer | None

    @classmethod
    def own_members(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        names = gated_mlp_of(float_class)
        assert names is not None

        @functools.wraps(float_class.forward)
        def forward(self, x: Tensor) -> Tensor:
            gate, up = getattr(self, names.gate)(x), None
            if not names.up:
                gate, up = gate.chunk(2, dim=-1)
            gate = getattr(self, names.act)(gate)
            up = getattr(self, names.up)(x) if names.up else up
            return getattr(self, names.down)(apply(self.product_quantizer, gate * up))

        return {"forward": forward}
