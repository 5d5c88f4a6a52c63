"""Attention with quantized scores, probabilities and context, for transformers' interface.

The attention module brings the quantizers: `scores_quantizer`, `probabilities_quantizer` and
`context_quantizer`, an identity where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from asymq import ops
from asymq.quantizer import is_fusible

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
    fused = is_fusible(module.scores_quantizer) and is_fusible(module.probabilities_quantizer)
    softmax = _fused_softmax if fused else _composed_softmax
    probabilities = softmax(module, scores, attention_mask, causal)
    if not fused or (dropout and module.training) or torch.compiler.is_compiling():
        context = nn.functional.dropout(probabilities, dropout, module.training) @ value
    else:
        context = _Attend.apply(probabilities, value, scores, attention_mask, causal, module)
    # With the heads side by side, so that a channel is a channel of the output.
    context = context.transpose(1, 2)
    context = module.context_quantizer(context.flatten(2)).view(context.shape)
    return context, probabilities


def _fused_softmax(
    module: nn.Module, scores: Tensor, attention_mask: Tensor | None, causal: bool
) -> Tensor:
    return ops.quantized_softmax(
        scores,
        attention_mask,
        module.scores_quantizer.range_arguments(),
        module.probabilities_quantizer.range_arguments(),
        causal=causal,
    )


def _composed_softmax(
    module: nn.Module, scores: Tensor, attention_mask: Tensor | None, causal: bool
) -> Tensor:
    """The same of single operations, for any quantizers in any state, or none. A row without any
    key is uniform before its quantizer, as in eager attention."""
    dtype, scores = scores.dtype, module.scores_quantizer(scores)
    hidden = None
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = ~attention_mask
    elif attention_mask is not None:
        scores = scores + attention_mask
        hidden = attention_mask <= torch.finfo(attention_mask.dtype).min / 2
    if hidden is not None:
        # The lowest finite value, as eager attention adds: a row without any key stays finite.
        scores = torch.where(hidden, torch.finfo(scores.dtype).min, scores)
    wide = torch.promote_types(scores.dtype, torch.float32)
    raw = torch.softmax(scores, dim=-1, dtype=wide).to(dtype)
    probabilities = module.probabilities_quantizer(raw)
    if hidden is not None and probabilities is not raw:
        # A range whose lower end is positive lifts zeros too: without this, every query would see
        # the future.
        probabilities = torch.where(hidden, 0, probabilities)
    return probabilities


class _Attend(torch.autograd.Function):
    """probabilities @ value that keeps the scores, which the softmax keeps too, and computes the
    probabilities again for the backward: one tensor of [queries, keys] less per layer."""

    @staticmethod
    def forward(ctx, probabilities, value, scores, attention_mask, causal, module):
        ctx.save_for_backward(value, scores, attention_mask)
        ctx.causal, ctx.module = causal, module
        return probabilities @ value

    @staticmethod
    def backward(ctx, grad):
        value, scores, attention_mask = ctx.saved_tensors
        grad = grad.to(value.dtype)
        grad_probabilities = grad_value = None
        if ctx.needs_input_grad[0]:
            grad_probabilities = grad @ value.transpose(-1, -2)
        if ctx.needs_input_grad[1]:
            probabilities = _fused_softmax(ctx.module, scores, attention_mask, ctx.causal)
            grad_value = probabilities.transpose(-1, -2) @ grad
        return grad_probabilities, grad_value, None, None, None, None


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
