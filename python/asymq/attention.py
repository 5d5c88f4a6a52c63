"""Attention with quantized scores, probabilities and context, for transformers' interface.

The attention module brings the quantizers: `scores_quantizer`, `probabilities_quantizer` and
`context_quantizer`, an identity where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from asymq.quantizer import QUANTIZING, Quantizer

NAME = "asymq"


def quantized_attention(
    module: nn.Module,
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
    makes, True where a query sees a key, broadcast against [batch, heads, queries, keys].
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Scaling the queries spares a pass over the scores.
    scores = module.scores_quantizer((query * scaling) @ key.transpose(-1, -2))
    hidden = None if attention_mask is None else ~attention_mask
    if hidden is not None:
        # The lowest finite value, as eager attention adds: a row without any key stays finite.
        scores = torch.where(hidden, torch.finfo(scores.dtype).min, scores)
    raw = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)

    def quantize(raw: Tensor) -> Tensor:
        quantizer = module.probabilities_quantizer
        probabilities = quantizer(raw)
        if (
            hidden is not None
            and isinstance(quantizer, Quantizer)
            and quantizer.state == QUANTIZING
        ):
            # A range whose lower end is positive lifts zeros too: without this, every query would
            # see the future.
            probabilities = torch.where(hidden, 0, probabilities)
        return probabilities

    probabilities = quantize(raw)
    if (dropout and module.training) or torch.compiler.is_compiling():
        context = nn.functional.dropout(probabilities, dropout, module.training) @ value
    else:
        context = _Attend.apply(probabilities, value, raw.detach(), quantize)
    # With the heads side by side, so that a channel is a channel of the output.
    context = context.transpose(1, 2)
    context = module.context_quantizer(context.flatten(2)).view(context.shape)
    return context, probabilities


class _Attend(torch.autograd.Function):
    """probabilities @ value that keeps the unquantized probabilities, which the softmax keeps too,
    and quantizes them again for the backward: one tensor of [queries, keys] less per layer."""

    @staticmethod
    def forward(ctx, probabilities, value, raw, quantize):
        ctx.save_for_backward(value, raw)
        ctx.quantize = quantize
        return probabilities @ value

    @staticmethod
    def backward(ctx, grad):
        value, raw = ctx.saved_tensors
        grad = grad.to(value.dtype)
        needs_probabilities, needs_value = ctx.needs_input_grad[:2]
        return (
            grad @ value.transpose(-1, -2) if needs_probabilities else None,
            ctx.quantize(raw).transpose(-1, -2) @ grad if needs_value else None,
            None,
            None,
        )


def attention_mask(*args, **kwargs) -> Tensor | None:
    """transformers' boolean mask, causal ones included: the probabilities need it too."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, quantized_attention)
AttentionMaskInterface.register(NAME, attention_mask)
