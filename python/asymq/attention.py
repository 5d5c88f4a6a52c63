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
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    probabilities = module.probabilities_quantizer(probabilities)
    if hidden is not None and _quantizes(module.probabilities_quantizer):
        # A range whose lower end is positive lifts zeros too: without this, every query would see
        # the future.
        probabilities = torch.where(hidden, 0, probabilities)
    attended = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    context = (attended @ value).transpose(1, 2)
    # With the heads side by side, so that a channel is a channel of the output.
    context = module.context_quantizer(context.flatten(2)).view(context.shape)
    return context, probabilities


def _quantizes(module: nn.Module) -> bool:
    return isinstance(module, Quantizer) and module.state == QUANTIZING


def attention_mask(*args, **kwargs) -> Tensor | None:
    """transformers' boolean mask, causal ones included: the probabilities need it too."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, quantized_attention)
AttentionMaskInterface.register(NAME, attention_mask)
