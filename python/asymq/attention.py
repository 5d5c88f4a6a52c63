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
    makes, True where a query sees a key, or a user's own that is added to the scores; broadcast
    against [batch, heads, queries, keys].
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Scaling the queries spares a pass over the scores.
    scores = module.scores_quantizer((query * scaling) @ key.transpose(-1, -2))
    hidden = None
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = ~attention_mask
    elif attention_mask is not None:
        # A mask of four dimensions comes as the user made it.
        if not attention_mask.is_floating_point():
            raise ValueError(
                "asymq: an attention mask of four dimensions must be bool (True: seen) or floating "
                f"point (added to the scores), got {attention_mask.dtype}"
            )
        scores = scores + attention_mask
        hidden = attention_mask <= torch.finfo(attention_mask.dtype).min / 2
    if hidden is not None:
        # The lowest finite value, as eager attention adds: a row without any key stays finite.
        scores = torch.where(hidden, torch.finfo(scores.dtype).min, scores)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    raw = torch.softmax(scores, dim=-1, dtype=dtype).to(value.dtype)
    quantizer = module.probabilities_quantizer
    probabilities = quantizer(raw)
    quantizes = isinstance(quantizer, Quantizer) and quantizer.state == QUANTIZING
    if quantizes:
        probabilities = _hide(probabilities, hidden)
    if not quantizes or (dropout and module.training) or torch.compiler.is_compiling():
        context = nn.functional.dropout(probabilities, dropout, module.training) @ value
    else:
        context = _Attend.apply(probabilities, value, raw.detach(), hidden, quantizer)
    # With the heads side by side, so that a channel is a channel of the output.
    context = context.transpose(1, 2)
    context = module.context_quantizer(context.flatten(2)).view(context.shape)
    return context, probabilities


def _hide(probabilities: Tensor, hidden: Tensor | None) -> Tensor:
    """A range whose lower end is positive lifts zeros too: without this, every query would see the
    future."""
    return probabilities if hidden is None else torch.where(hidden, 0, probabilities)


class _Attend(torch.autograd.Function):
    """probabilities @ value that keeps the unquantized probabilities, which the softmax keeps too,
    and quantizes them again for the backward: one tensor of [queries, keys] less per layer."""

    @staticmethod
    def forward(ctx, probabilities, value, raw, hidden, quantizer):
        ctx.save_for_backward(value, raw, hidden)
        ctx.quantizer = quantizer
        return probabilities @ value

    @staticmethod
    def backward(ctx, grad):
        value, raw, hidden = ctx.saved_tensors
        grad = grad.to(value.dtype)
        grad_probabilities = grad_value = None
        if ctx.needs_input_grad[0]:
            grad_probabilities = grad @ value.transpose(-1, -2)
        if ctx.needs_input_grad[1]:
            probabilities = _hide(ctx.quantizer.fake_quantize(raw), hidden)
            grad_value = probabilities.transpose(-1, -2) @ grad
        return grad_probabilities, grad_value, None, None, None


def attention_mask(*args, **kwargs) -> Tensor | None:
    """transformers' boolean mask, causal ones included: the probabilities need it too."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, quantized_attention)
AttentionMaskInterface.register(NAME, attention_mask)
