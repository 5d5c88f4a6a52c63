"""Experts of transformers' mixtures, whose weights are parameters of three axes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymq.layers.quantized import Quantized, quantized_parameter, reading_quantized
from asymq.quantizers import Quantizer, QuantSpec, WeightQuantizer, apply

# Of transformers' ways to run experts, those that call `_apply_gate` on what down_proj is given.
_OPEN = ("batched_mm", "grouped_mm")


def is_experts(module: nn.Module) -> bool:
    """Whether they are gated experts behind transformers' experts interface."""
    weights = [module._parameters.get(name) for name in QuantExperts.weights]
    return (
        type(module).__name__.endswith("Experts")
        and all(weight is not None and weight.dim() == 3 for weight in weights)
        and hasattr(module, "_apply_gate")
        and getattr(module, "has_gate", False)
        and not getattr(module, "has_post_expert_norm", True)
    )


class ExpertsWeightQuantizer(WeightQuantizer):
    """Quantizes a weight [experts, ...], each expert's with ranges of its own; axes are those of
    one expert's weight.

    Ranges have the shape [experts, 1, 1], [experts, out, 1] or [experts, out, in / size] (in and
    out change places where the weight is [experts, in, out]).
    """

    def __init__(self, spec: QuantSpec, shape: Sequence[int], **options):
        experts, *of_one = shape
        super().__init__(spec, of_one, **options)
        ranges = self.range_shape if len(self.range_shape) == len(of_one) else [1] * len(of_one)
        self._create_ranges(spec, torch.Size((experts, *ranges)), options.get("device"))
        self.weight_shape = torch.Size(shape)


class QuantExperts(Quantized):
    """Experts with quantized weights, tokens and products of gate and up, which down_proj is given.

    What else happens within stays float: both halves before their product, and the sum over
    experts.
    """

    sites = (
        "gate_up_proj_quantizer",
        "down_proj_quantizer",
        "input_quantizer",
        "product_quantizer",
    )
    weights: ClassVar[tuple[str, ...]] = ("gate_up_proj", "down_proj")
    kinds: ClassVar[Mapping[str, str]] = {
        "input_quantizer": "input",
        "product_quantizer": "input",
    }
    input_quantizer: Quantizer | None
    product_quantizer: Quantizer | None

    @classmethod
    def own_members(cls, float_class: Any) -> dict[str, Any]:
        @functools.wraps(float_class.forward)
        def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
            hidden_states = apply(self.input_quantizer, hidden_states)
            closed = self.config._experts_implementation not in _OPEN
            run = float_class.forward
            if closed and self.product_quantizer is not None:
                run = _one_by_one
            with reading_quantized(self):
                return run(self, hidden_states, *args, **kwargs)

        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return apply(self.product_quantizer, float_class._apply_gate(self, gate_up))

        properties = {name: quantized_parameter(name) for name in cls.weights}
        return {"forward": forward, "_apply_gate": _apply_gate, **properties}

    @classmethod
    def channels(cls, module: nn.Module) -> dict[str, int]:
        """Size of the last axis at the activation sites."""
        axis = 1 if module.is_transposed else 2
        shapes = (tuple(module.get_parameter(name).shape) for name in cls.weights)
        sites = ("input_quantizer", "product_quantizer")
        return {site: shape[axis] for site, shape in zip(sites, shapes, strict=True)}

    @classmethod
    def make_weight_quantizer(
        cls, module: nn.Module, weight: str, spec: QuantSpec, name: str
    ) -> WeightQuantizer:
        parameter = module.get_parameter(weight)
        axes = (1, 0) if module.is_transposed else (0, 1)
        return ExpertsWeightQuantizer(
            spec,
            tuple(parameter.shape),
            channel_axis=axes[0],
            reduction_axis=axes[1],
            name=name,
            device=parameter.device,
        )


def _one_by_one(experts, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
    """What the experts' own forward computes, with `_apply_gate` between the two products.

    hidden_states: [tokens, width]. routing: indices of experts and their weights, both [tokens, k].
    """
    indices, weights = *routing, *named.values()
    result = torch.zeros_like(hidden_states)
    for expert in indices.unique().tolist():
        if expert < experts.num_experts:  # beyond lie those of other processes
            token, place = torch.where(indices == expert)
            gate_up = _linear(experts, "gate_up_proj", expert, hidden_states[token])
            y = _linear(experts, "down_proj", expert, experts._apply_gate(gate_up))
            y = y * weights[token, place, None]
            result.index_add_(0, token, y.to(result.dtype))
    return result


def _linear(experts, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return F.linear(x, weight.t() if experts.is_transposed else weight, bias)
