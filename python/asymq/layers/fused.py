"""Functions with quantizers around them: one kernel each way where the quantizers allow it, single
operations elsewhere, with the same result but for rounding."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymq import ops
from asymq.layers.activation import gating_function
from asymq.quantizers import Quantizer, apply, is_unobserved

Child = TypeVar("Child", bound=nn.Module)

# Added to a score, this and less hides its key; a smaller bias (ALiBi's) is part of the score.
HIDES = -1e4
_HIDES_IN_BFLOAT16 = torch.tensor(HIDES, dtype=torch.bfloat16).item()


def ranges_of(x: Tensor, *quantizers: Quantizer | None) -> list[ops.RangeArguments] | None:
    """What one kernel takes for all of these, each with a stored range; None where they must be
    called one by one. x: of the shape that they quantize, with its samples along the first axis."""
    ranges = []
    for quantizer in quantizers:
        if quantizer is None or quantizer.live or not quantizer.fusible:
            return None
        ranges.append(quantizer.range_arguments(x))
    return ranges


def may_skip(child: nn.Module, cls: type[Child]) -> TypeGuard[Child]:
    """Whether a parent may do the work of a child of class `cls` itself: it is that class still (no
    adapter, not sharded alone), and nobody can notice that it is not called."""
    return type(child) is cls and is_unobserved(child)


def gelu(x: Tensor, before: Quantizer | None, after: Quantizer | None) -> Tensor:
    """after(gelu(before(x))) with GELU's tanh approximation, of any shape."""
    ranges = ranges_of(x, before, after)
    if ranges is not None:
        return ops.quantized_gelu(x, *ranges)
    return apply(after, F.gelu(apply(before, x), approximate="tanh"))


def glu(gate: Tensor, up: Tensor, activation: nn.Module, after: Quantizer | None) -> Tensor:
    """after(activation(gate) * up), of any shape."""
    function = gating_function(activation)
    if function and after is not None and after.fusible and is_unobserved(activation):
        return ops.quantized_glu(gate, up, after.range_arguments(gate), activation=function)
    return apply(after, activation(gate) * up)


def may_normalize(x: Tensor, weight: Tensor, quantizer: Quantizer) -> bool:
    """Whether `rms_norm` may take these. (LlamaRMSNorm computes in float32 whatever x is.)"""
    return x.dtype == weight.dtype != torch.float64 and quantizer.fusible


def rms_norm(x: Tensor, weight: Tensor, eps: float, quantizer: Quantizer) -> Tensor:
    """quantizer(weight * x / rms(x)) as LlamaRMSNorm computes it, of a weight that is quantized."""
    return ops.quantized_rms_norm(x, weight, quantizer.range_arguments(x), eps=eps)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    causal: bool,
    window: int | None,
    before: Quantizer | None,
    after: Quantizer | None,
) -> Tensor | None:
    """after(softmax(before(scaling * query @ keyᵀ) + mask)) @ value, [batch, heads, queries,
    width], where the quantizers allow one kernel each way; else None.

    query: [batch, heads, queries, width]. key, value: [batch, key heads, keys, width]. mask, causal
    and window: as `softmax` has them.
    """
    scores = query.detach()[..., :1].expand(*query.shape[:3], key.shape[2])  # of their shape
    ranges = ranges_of(scores, before, after)
    if ranges is None:
        return None
    return ops.quantized_attention(
        query, key, value, mask, *ranges, scaling=scaling, causal=causal, window=window
    )


def softmax(
    scores: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    before: Quantizer | None,
    after: Quantizer | None,
) -> Tensor:
    """Attention's probabilities after(softmax(before(scores) + mask)) over the last axis, 0 for
    hidden keys.

    scores: [batch, heads, queries, keys]. mask: bool (True: the query sees the key) or added to the
    quantized scores (HIDES and less hides the key), broadcast against them. causal: query q sees
    keys up to q + keys - queries, with a window of those the last `window` alone. Of a row that
    sees no key the kernel gives 0, single operations what `after` makes of the uniform
    distribution, as eager attention.
    """
    ranges = ranges_of(scores, before, after)
    if ranges is not None:
        return ops.quantized_softmax(scores, mask, *ranges, causal=causal, window=window)
    dtype, scores = scores.dtype, apply(before, scores)
    hidden = None
    if causal:
        queries, keys = scores.shape[-2:]
        ones = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
        hidden = ones.triu(1 + keys - queries)
        if window is not None:
            hidden = hidden | ones.tril(keys - queries - window)
    if mask is not None:
        if mask.dtype == torch.bool:
            unseen = ~mask
        else:
            scores = scores + mask
            unseen = mask <= (_HIDES_IN_BFLOAT16 if mask.dtype == torch.bfloat16 else HIDES)
        hidden = unseen if hidden is None else hidden | unseen
    if hidden is not None:
        # The lowest finite value, as eager attention adds: a row without any key stays finite.
        scores = torch.where(hidden, torch.finfo(scores.dtype).min, scores)
    wide = torch.promote_types(scores.dtype, torch.float32)
    raw = torch.softmax(scores, dim=-1, dtype=wide).to(dtype)
    probabilities = apply(after, raw)
    if hidden is not None and probabilities is not raw:
        # A range whose lower end is positive lifts zeros too: without this, every query would see
        # the future.
        probabilities = torch.where(hidden, 0, probabilities)
    return probabilities


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    quantizer: Quantizer | None,
    ignore_index: int = -100,
    classes: int | None = None,
) -> Tensor:
    """-log softmax(quantizer(logits))[label] of every row, 0 where the label is ignore_index.

    logits: [..., classes], as they are quantized, or with more columns that count for nothing.
    labels: one for each row, of one dimension, which the result has, in float32 (float64 for
    float64).
    """
    ranges = ranges_of(logits[..., :classes], quantizer)
    if ranges is not None:
        rows = logits.reshape(-1, logits.shape[-1])
        return ops.quantized_cross_entropy(
            rows, labels, *ranges, ignore_index=ignore_index, classes=classes
        )
    logits = apply(quantizer, logits[..., :classes])
    logits = logits.reshape(-1, logits.shape[-1])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="none")


def kl_div(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    quantizer: Quantizer | None,
    temperature: float,
    ignore_index: int = -100,
    classes: int | None = None,
) -> Tensor:
    """T²·KL(softmax(teacher_logits/T) || softmax(quantizer(logits)/T)) of every row, T the
    temperature, 0 where the label is ignore_index.

    logits, teacher_logits: [..., classes], as they are quantized, the first also with more columns
    that count for nothing. labels: one for each row, of one dimension, which the result has, in
    float32 (float64 for float64).
    """
    ranges = ranges_of(logits[..., :classes], quantizer)
    teacher_logits = teacher_logits.reshape(-1, teacher_logits.shape[-1])
    if ranges is not None:
        return ops.quantized_kl_div(
            logits.reshape(-1, logits.shape[-1]),
            teacher_logits,
            *ranges,
            labels=labels,
            temperature=temperature,
            ignore_index=ignore_index,
            classes=classes,
        )
    logits = apply(quantizer, logits[..., :classes])
    logits = logits.reshape(-1, logits.shape[-1])
    wide = torch.promote_types(logits.dtype, torch.float32)
    student = torch.log_softmax(logits.to(wide) / temperature, -1)
    target = torch.softmax(teacher_logits.to(wide) / temperature, -1)
    losses = F.kl_div(student, target, reduction="none").sum(-1) * temperature**2
    return losses.masked_fill(labels == ignore_index, 0)
