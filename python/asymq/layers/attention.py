"""Attention with quantized scores, probabilities and context, for transformers' interface."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import causal_mask_function, sdpa_mask

from asymq import ops
from asymq.layers import fused
from asymq.layers.quantized import Quantized
from asymq.quantizers import OFF, Quantizer, apply

NAME = "asymq"


class QuantAttention(Quantized):
    """An attention module of transformers that goes through its attention interface, where
    `quantized_attention` uses these quantizers."""

    sites = ("scores_quantizer", "probabilities_quantizer", "context_quantizer")
    scores_quantizer: Quantizer | None
    probabilities_quantizer: Quantizer | None
    context_quantizer: Quantizer | None
    config: PreTrainedConfig

    @classmethod
    def own_members(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(float_class.forward)
        def forward(self, *args, **kwargs):
            self.need_interface()
            return float_class.forward(self, *args, **kwargs)

        return {"forward": forward}

    def need_interface(self) -> None:
        """RuntimeError where another implementation has been chosen, which would pass over the
        quantizers."""
        implementation = self.config._attn_implementation
        if implementation == NAME:
            return
        for site in self.sites:
            quantizer = getattr(self, site)
            if quantizer is not None and quantizer.state != OFF:
                raise RuntimeError(
                    f"{quantizer.label}: the attention implementation {implementation!r} knows no "
                    f"quantizers: call model.set_attn_implementation({NAME!r}), or turn the "
                    "quantizers off (asymq.disable_quantizers)"
                )


def quantized_attention(
    module: QuantAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """(context [batch, queries, heads, width], probabilities [batch, heads, queries, keys]).

    query, key, value: [batch, heads, tokens, width]. attention_mask: what `attention_mask` below
    makes, True where a query sees a key, or a user's own that is added to the scores; broadcast
    against [batch, heads, queries, keys]. None: the causal one, if module.is_causal and there are
    as many keys as queries.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Scaling the queries spares a pass over the scores.
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None and not (
        attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    ):
        # A mask of four dimensions comes as the user made it.
        raise ValueError(
            "asymq: an attention mask of four dimensions must be bool (True: seen) or floating "
            f"point (added to the scores), got {attention_mask.dtype}"
        )
    queries, keys = scores.shape[-2:]
    causal = attention_mask is None and queries == keys and getattr(module, "is_causal", False)
    # One implementation runs all attention of a model, also that without quantizers.
    before, after, of_context = (getattr(module, site, None) for site in QuantAttention.sites)
    dropout = dropout if module.training else 0.0
    ranges = fused.ranges_of(before, after)
    if ranges is not None and not dropout and not torch.compiler.is_compiling():
        probabilities = ops.quantized_softmax(scores, attention_mask, *ranges, causal=causal)
        context = _attend(probabilities, value, scores, attention_mask, causal, *ranges)
    else:
        probabilities = fused.softmax(scores, attention_mask, causal, before, after)
        context = nn.functional.dropout(probabilities, dropout) @ value
    # With the heads side by side, so that a channel is a channel of the output.
    context = context.transpose(1, 2)
    context = apply(of_context, context.flatten(2)).view(context.shape)
    return context, probabilities


def _attend(
    probabilities: Tensor,
    value: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    causal: bool,
    before: ops.RangeArguments,
    after: ops.RangeArguments,
) -> Tensor:
    tensors = (*before.parameters, *after.parameters)
    ranges = before._replace(parameters=()), after._replace(parameters=()), len(before.parameters)
    return _Attend.apply(probabilities, value, scores, mask, causal, ranges, *tensors)


class _Attend(torch.autograd.Function):
    """probabilities @ value that keeps the scores, which the softmax keeps too, and computes the
    probabilities again for the backward: one tensor of [queries, keys] less per layer."""

    @staticmethod
    def forward(ctx, probabilities, value, scores, mask, causal, ranges, *range_tensors):
        # Saved with their versions: ranges that change before the backward are an error, as in the
        # softmax's own backward.
        ctx.save_for_backward(value, scores, mask, *range_tensors)
        ctx.causal, ctx.ranges = causal, ranges
        return probabilities @ value

    @staticmethod
    def backward(ctx, grad):
        value, scores, mask, *range_tensors = ctx.saved_tensors
        grad = grad.to(value.dtype)
        grad_probabilities = grad_value = None
        if ctx.needs_input_grad[0]:
            grad_probabilities = grad @ value.transpose(-1, -2)
        if ctx.needs_input_grad[1]:
            before, after, first = ctx.ranges
            probabilities = ops.quantized_softmax(
                scores,
                mask,
                before._replace(parameters=tuple(range_tensors[:first])),
                after._replace(parameters=tuple(range_tensors[first:])),
                causal=ctx.causal,
            )
            grad_value = probabilities.transpose(-1, -2) @ grad
        return grad_probabilities, grad_value, *[None] * (4 + len(range_tensors))


def attention_mask(*args, **kwargs) -> Tensor | None:
    """transformers' boolean mask; None for the plain causal one, which needs no tensor."""
    plain = (
        kwargs.get("attention_mask") is None
        and kwargs.get("mask_function") is causal_mask_function
        and kwargs.get("local_size") is None
        and kwargs.get("q_length") == kwargs["kv_length"]
    )
    return None if plain else sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, quantized_attention)
AttentionMaskInterface.register(NAME, attention_mask)
