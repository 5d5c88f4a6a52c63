"""The private operators that do more than quantize: their quantizers, and what is between them.

All is computed in float32, for float64 tensors in float64, and rounded to their dtype where the
operators round.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, silu

from asymq.composite import checks
from asymq.composite.checks import refusal
from asymq.composite.quantizers import Quantizer, read, read_pair
from asymq.reference import compute_dtype

_ATEN = torch.ops.aten


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


# ---- GELU --------------------------------------------------------------------------------------


def _gelu_pair(x: Tensor, arguments: Sequence) -> tuple[Quantizer, Quantizer]:
    checks.check_elements("quantized_gelu", "x", x)
    return read_pair("quantized_gelu", "x", x, ("input's ", "output's "), arguments)


def _quantized_gelu(x: Tensor, *arguments) -> Tensor:
    before, after = _gelu_pair(x, arguments)
    quantized = before.forward(_wide(torch.empty_like(x).copy_(x)))
    return after.forward(gelu(quantized, approximate="tanh")).to(x.dtype)


def _quantized_gelu_backward(grad: Tensor, x: Tensor, *rest) -> tuple[Tensor | None, ...]:
    *arguments, needs = rest
    checks.check_grad("quantized_gelu", "x", grad, x)
    before, after = _gelu_pair(x, arguments)
    # In the layout of the results.
    dense, upstream = (_wide(torch.empty_like(x).copy_(t)) for t in (x, grad))
    quantized = before.forward(dense)
    activated = gelu(quantized, approximate="tanh")
    dactivated, *of_after = after.backward(upstream, activated, needs[3:])
    dquantized = _ATEN.gelu_backward(dactivated, quantized, approximate="tanh")
    dx, *of_before = before.backward(dquantized, dense, needs[1:3])
    return dx.to(x.dtype) if needs[0] else None, *of_before, *of_after


# ---- softmax -----------------------------------------------------------------------------------


def _softmax_pair(
    scores: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    arguments: Sequence,
    where: str = "quantized_softmax",
) -> tuple[Quantizer, Quantizer]:
    if scores.dim() != 4:
        raise refusal(
            where,
            "scores must have 4 dimensions, [batch, heads, queries, keys], got shape "
            f"{list(scores.shape)}",
        )
    checks.check_elements(where, "scores", scores)
    if mask is not None:
        checks.check_mask(where, mask, scores)
    if window is not None and not (causal and window >= 1):
        without = "" if causal else " without causal"
        raise refusal(where, f"window must be at least 1, with causal, got {window}{without}")
    return read_pair(where, "scores", scores, ("scores' ", "probabilities' "), arguments)


def _visible(
    scores: Tensor, mask: Tensor | None, causal: bool, window: int | None
) -> Tensor | None:
    """Which keys a query sees, against which scores broadcast; None: all."""
    visible = None
    if causal:
        queries, keys = scores.shape[-2:]
        key = torch.arange(keys, device=scores.device)
        last = torch.arange(queries, device=scores.device)[:, None] + (keys - queries)
        visible = key <= last
        if window is not None:
            visible = visible & (key > last - window)
    if mask is not None:
        # -1e4 as the mask's dtype has it, and what is below.
        hides = mask.new_full((), -1e4) if mask.dtype != torch.bool else None
        seen = mask if hides is None else ~(mask <= hides)
        visible = seen if visible is None else visible & seen
    return visible


def _masked(values: Tensor, visible: Tensor | None, hidden: float) -> Tensor:
    return values if visible is None else torch.where(visible, values, hidden)


def _shown(quantized: Tensor, mask: Tensor | None, visible: Tensor | None) -> Tensor:
    """What the softmax is taken of."""
    if mask is not None and mask.dtype != torch.bool:
        quantized = quantized + mask.to(quantized.dtype)
    return _masked(quantized, visible, -torch.inf)


def _probabilities(shown: Tensor, largest: Tensor, sum: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax over the keys and the sum of exponentials, which is computed where it is not
    given; 0 of 0 where no key is seen."""
    finite = torch.where(largest == -torch.inf, 0, largest)
    exponentials = (shown - finite).exp()
    sum = exponentials.sum(-1, keepdim=True) if sum is None else sum
    return exponentials / torch.where(sum == 0, 1, sum), sum


def _quantized_softmax(
    scores: Tensor, mask: Tensor | None, causal: bool, window: int | None, *arguments
) -> tuple[Tensor, Tensor]:
    before, after = _softmax_pair(scores, mask, causal, window, arguments)
    visible = _visible(scores, mask, causal, window)
    shown = _shown(before.forward(_wide(scores.contiguous())), mask, visible)
    none = shown.new_full((*shown.shape[:-1], 1), -torch.inf)
    largest = none if scores.shape[-1] == 0 else shown.amax(-1, keepdim=True)
    probabilities, sum = _probabilities(shown, largest, None)
    out = _masked(after.forward(probabilities), visible, 0).to(scores.dtype)
    return out.contiguous(), torch.cat((largest, sum), -1)


def _quantized_softmax_backward(
    grad: Tensor,
    scores: Tensor,
    statistics: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    *rest,
) -> tuple[Tensor | None, ...]:
    *arguments, needs = rest
    checks.check_grad("quantized_softmax", "scores", grad, scores)
    before, after = _softmax_pair(scores, mask, causal, window, arguments)
    visible = _visible(scores, mask, causal, window)
    # A hidden score, which may be NaN, adds to no sum.
    wide = _masked(_wide(scores.contiguous()), visible, 0)
    shown = _shown(before.forward(wide), mask, visible)
    probabilities, _ = _probabilities(shown, *statistics.split(1, -1))
    upstream = _masked(_wide(grad.contiguous()), visible, 0)
    dprobabilities, *of_after = after.backward(upstream, probabilities, needs[3:])
    dot = (dprobabilities * probabilities).sum(-1, keepdim=True)
    dshown = _masked(probabilities * (dprobabilities - dot), visible, 0)
    dscores, *of_before = before.backward(dshown, wide, needs[1:3])
    dscores = dscores.to(scores.dtype).contiguous() if needs[0] else None
    return dscores, *of_before, *of_after


# ---- attention ---------------------------------------------------------------------------------


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    arguments: Sequence,
) -> None:
    where = "quantized_attention"
    for name, heads in (("query", query), ("key", key), ("value", value)):
        if heads.dim() != 4:
            raise refusal(
                where,
                f"{name} must have 4 dimensions, [batch, heads, tokens, width], got shape "
                f"{list(heads.shape)}",
            )
        checks.check_elements(where, name, heads)
        if (heads.dtype, heads.device) != (query.dtype, query.device):
            wanted, got = (f"{checks.dtype_name(t.dtype)} on {t.device}" for t in (query, heads))
            message = f"{name} must have the query's dtype and device, {wanted}, got {got}"
            raise refusal(where, message)
    if (key.shape[0], key.shape[3]) != (query.shape[0], query.shape[3]):
        raise refusal(
            where,
            f"key must have the query's batch and width, those of {list(query.shape)}, got shape "
            f"{list(key.shape)}",
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise refusal(
            where,
            "the query's heads must be a multiple of the key's, got "
            f"{query.shape[1]} and {key.shape[1]}",
        )
    if value.shape[:3] != key.shape[:3]:
        raise refusal(
            where,
            "value must have the key's batch, heads and tokens, those of "
            f"{list(key.shape)}, got shape {list(value.shape)}",
        )
    scores = query.new_empty(()).expand(*query.shape[:3], key.shape[2])  # of their shape
    _softmax_pair(scores, mask, causal, window, arguments, where)


def _by_key_head(x: Tensor, of_keys: Tensor) -> Tensor:
    """x of all heads as rows of the key heads: one head of `of_keys` serves as many consecutive
    heads of x as there are, without a copy for each."""
    rows = x.shape[1] // of_keys.shape[1] * x.shape[2]
    return x.reshape(x.shape[0], of_keys.shape[1], rows, x.shape[3])


def _multiply(x: Tensor, of_keys: Tensor) -> Tensor:
    return (_by_key_head(x, of_keys) @ of_keys).view(*x.shape[:3], of_keys.shape[3])


def _multiply_summed(a: Tensor, b: Tensor, of_keys: Tensor) -> Tensor:
    """aᵀ @ b, summed over the heads that a key head serves."""
    return _by_key_head(a, of_keys).transpose(-1, -2) @ _by_key_head(b, of_keys)


def _heads_inside(x: Tensor) -> Tensor:
    """With the memory of [batch, tokens, heads, width]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    scaling: float,
    *arguments,
) -> tuple[Tensor, Tensor]:
    _check_attention(query, key, value, mask, causal, window, arguments)
    scores = _multiply(query * scaling, key.transpose(-1, -2))
    probabilities, statistics = _quantized_softmax(scores, mask, causal, window, *arguments)
    return _heads_inside(_multiply(probabilities, value)), statistics


def _quantized_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
    statistics: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    scaling: float,
    *rest,
) -> tuple[Tensor | None, ...]:
    *arguments, needs = rest
    checks.check_grad("quantized_attention", "the result", grad, context)
    _check_attention(query, key, value, mask, causal, window, arguments)
    sight = mask, causal, window
    scaled = query * scaling
    scores = _multiply(scaled, key.transpose(-1, -2))
    dquery = dkey = dvalue = None
    if needs[2]:
        probabilities, _ = _quantized_softmax(scores, *sight, *arguments)
        dvalue = _heads_inside(_multiply_summed(probabilities, grad, value))
    of_softmax = [needs[0] or needs[1], *needs[3:]]
    if not any(of_softmax):
        return dquery, dkey, dvalue, None, None, None, None
    dscores, *of_ranges = _quantized_softmax_backward(
        _multiply(grad, value.transpose(-1, -2)),
        *(scores, statistics, *sight, *arguments, of_softmax),
    )
    if dscores is not None:
        dquery = _heads_inside(_multiply(dscores, key) * scaling) if needs[0] else None
        dkey = _heads_inside(_multiply_summed(dscores, scaled, key)) if needs[1] else None
    return dquery, dkey, dvalue, *of_ranges


# ---- cross-entropy -----------------------------------------------------------------------------


def _of_columns(dlogits: Tensor, logits: Tensor) -> Tensor:
    """A gradient of classes, with 0 for the columns behind them."""
    padding = logits.shape[1] - dlogits.shape[1]
    dlogits = dlogits.to(logits.dtype)
    return pad(dlogits, (0, padding)) if padding else dlogits


def _check_cross_entropy(
    logits: Tensor, labels: Tensor, arguments: Sequence, classes: int | None
) -> Quantizer:
    checks.check_logits("quantized_cross_entropy", logits, classes)
    checks.check_labels("quantized_cross_entropy", labels, logits)
    return Quantizer(*arguments).check("quantized_cross_entropy", "", "logits", logits)


def _own_classes(logits: Tensor, labels: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """The classes [tokens, 1], and which of the labels are neither a class nor ignored."""
    last = logits.shape[1] - 1
    wrong = ((labels < 0) | (labels > last)) & ~ignored
    return labels.clamp(0, last).unsqueeze(1), wrong


def _quantized_cross_entropy(logits: Tensor, labels: Tensor, *rest) -> tuple[Tensor, Tensor]:
    *arguments, classes, ignore_index = rest
    quantizer = _check_cross_entropy(logits, labels, arguments, classes)
    logits = logits[:, :classes]
    ignored = labels == ignore_index
    own, wrong = _own_classes(logits, labels, ignored)
    if labels.device.type == "cpu" and wrong.any():
        raise IndexError(
            "asymq::quantized_cross_entropy: labels must be from 0 to "
            f"{logits.shape[1] - 1} or ignore_index, got {labels[wrong][0].item()}"
        )
    quantized = quantizer.forward(_wide(logits))
    largest = quantized.amax(1, keepdim=True)
    shifted = quantized - largest
    log_sum = shifted.exp().sum(1, keepdim=True).log()
    losses = (log_sum - shifted.gather(1, own)).squeeze(1)
    losses = losses.masked_fill(wrong, torch.nan).masked_fill(ignored, 0)
    return losses, torch.cat((largest, log_sum), 1)


def _quantized_cross_entropy_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, statistics: Tensor, *rest
) -> tuple[Tensor | None, ...]:
    *arguments, classes, ignore_index, needs = rest
    checks.check_grad("quantized_cross_entropy", "losses", grad, statistics.select(1, 0))
    quantizer = _check_cross_entropy(logits, labels, arguments, classes)
    ignored = labels == ignore_index
    wide = _wide(logits[:, :classes])
    own, wrong = _own_classes(wide, labels, ignored)
    largest, log_sum = statistics.split(1, 1)
    probabilities = (quantizer.forward(wide) - largest - log_sum).exp()
    dquantized = probabilities.scatter_add(1, own, -torch.ones_like(own, dtype=wide.dtype))
    dquantized = (dquantized * grad.unsqueeze(1)).masked_fill(wrong.unsqueeze(1), torch.nan)
    dquantized = dquantized.masked_fill(ignored.unsqueeze(1), 0)
    dlogits, *of_range = quantizer.backward(dquantized, wide, needs[1:])
    return _of_columns(dlogits, logits) if needs[0] else None, *of_range


# ---- Kullback-Leibler divergence ---------------------------------------------------------------


def _check_kl_div(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    temperature: float,
    arguments: Sequence,
    classes: int | None,
) -> Quantizer:
    where = "quantized_kl_div"
    checks.check_logits(where, logits, classes)
    checks.check_twin(where, "teacher_logits", teacher_logits, "the logits'", logits[:, :classes])
    if labels is not None:
        checks.check_labels(where, labels, logits)
    checks.check_positive(where, "temperature", temperature)
    return Quantizer(*arguments).check(where, "", "logits", logits)


def _log_softmax(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows, with what it takes: the largest and the logarithm of the sum of exponentials."""
    largest = rows.amax(1, keepdim=True)
    shifted = rows - largest
    log_sum = shifted.exp().sum(1, keepdim=True).log()
    return shifted - log_sum, largest, log_sum


def _quantized_kl_div(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, *rest
) -> tuple[Tensor, Tensor]:
    *arguments, temperature, classes, ignore_index = rest
    quantizer = _check_kl_div(logits, teacher_logits, labels, temperature, arguments, classes)
    log_q, *student = _log_softmax(quantizer.forward(_wide(logits[:, :classes])) / temperature)
    log_p, *teacher = _log_softmax(_wide(teacher_logits) / temperature)
    p = log_p.exp()
    # A teacher's -inf, a class that it excludes, adds nothing.
    terms = (p * (log_p - log_q)).masked_fill(p == 0, 0)
    losses = terms.sum(1) * (temperature * temperature)
    if labels is not None:
        losses = losses.masked_fill(labels == ignore_index, 0)
    return losses, torch.cat((*student, *teacher), 1)


def _quantized_kl_div_backward(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    statistics: Tensor,
    *rest,
) -> tuple[Tensor | None, ...]:
    *arguments, temperature, classes, ignore_index, needs = rest
    checks.check_grad("quantized_kl_div", "losses", grad, statistics.select(1, 0))
    quantizer = _check_kl_div(logits, teacher_logits, labels, temperature, arguments, classes)
    wide = _wide(logits[:, :classes])
    largest, log_sum, teacher_largest, teacher_log_sum = statistics.split(1, 1)
    q = (quantizer.forward(wide) / temperature - largest - log_sum).exp()
    p = (_wide(teacher_logits) / temperature - teacher_largest - teacher_log_sum).exp()
    dquantized = (q - p) * (grad * temperature).unsqueeze(1)
    if labels is not None:
        dquantized = dquantized.masked_fill((labels == ignore_index).unsqueeze(1), 0)
    dlogits, *of_range = quantizer.backward(dquantized, wide, needs[1:])
    return _of_columns(dlogits, logits) if needs[0] else None, *of_range


# ---- RMSNorm -----------------------------------------------------------------------------------


def _check_rms_norm(x: Tensor, weight: Tensor, arguments: Sequence) -> Quantizer:
    where = "quantized_rms_norm"
    checks.check_elements(where, "x", x)
    if x.dim() == 0:
        raise refusal(
            where,
            "x must have at least one dimension, the last of which is normalized, got shape []",
        )
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise refusal(
            where,
            f"weight must have one element for each of the last axis of x, shape [{x.shape[-1]}], "
            f"got {list(weight.shape)}",
        )
    checks.check_kin(where, "weight", weight, "x", x)
    return Quantizer(*arguments).check_any(where, "output's ", "x", x)


def _normalized(x: Tensor, statistics: Tensor) -> Tensor:
    return (_wide(x) * statistics).to(x.dtype)


def _quantized_rms_norm(x: Tensor, weight: Tensor, eps: float, *arguments) -> tuple[Tensor, Tensor]:
    quantizer = _check_rms_norm(x, weight, arguments)
    statistics = (_wide(x).square().mean(-1, keepdim=True) + eps).rsqrt()
    normalized = quantizer.forward(_normalized(x, statistics) * weight)
    return normalized.contiguous(), statistics.contiguous()


def _quantized_rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor, *rest
) -> tuple[Tensor | None, ...]:
    *arguments, needs = rest
    checks.check_grad("quantized_rms_norm", "x", grad, x)
    quantizer = _check_rms_norm(x, weight, arguments)
    normalized = _normalized(x, statistics)
    dweighted, *of_range = quantizer.backward(grad, normalized * weight, needs[2:])
    dx = dweight = None
    if needs[0]:
        wide, dnormalized = _wide(x), _wide(dweighted) * _wide(weight)
        along = (dnormalized * wide).mean(-1, keepdim=True) * statistics.square()
        dx = (statistics * (dnormalized - wide * along)).to(x.dtype).contiguous()
    if needs[1]:
        dweight = _wide(dweighted) * _wide(normalized)
        if x.dim() > 1:
            dweight = dweight.flatten(0, -2).sum(0, dtype=torch.float64)
        dweight = dweight.to(x.dtype)
    return dx, dweight, *of_range


# ---- gated linear unit -------------------------------------------------------------------------


def _check_glu(gate: Tensor, up: Tensor, activation: int, arguments: Sequence) -> list[Quantizer]:
    """Of the gate, its activation, the other operand and the product."""
    where = "quantized_glu"
    if activation not in (0, 1):
        raise refusal(where, f"activation must be 0 (silu) or 1 (gelu_tanh), got {activation}")
    checks.check_elements(where, "gate", gate)
    checks.check_like(where, "up", up, "gate", gate)
    owners = ("gate's ", "gate"), ("activation's ", "gate"), ("up's ", "up"), ("product's ", "gate")
    return [
        quantizer.check_any(where, whose, name, up if name == "up" else gate)
        for quantizer, (whose, name) in zip(read(arguments), owners, strict=True)
    ]


def _activated(gate: Tensor, activation: int) -> Tensor:
    return gelu(gate, approximate="tanh") if activation else silu(gate)


def _activated_backward(grad: Tensor, gate: Tensor, activation: int) -> Tensor:
    if activation:
        return _ATEN.gelu_backward(grad, gate, approximate="tanh")
    return _ATEN.silu_backward(grad, gate)


def _glu_steps(gate: Tensor, up: Tensor, activation: int, of: list[Quantizer]) -> list[Tensor]:
    """The quantized gate, its activation, that quantized, the quantized other operand, and the
    product."""
    of_gate, of_activation, of_up, _ = of
    quantized_gate = of_gate.forward(gate).contiguous()
    raw = _activated(quantized_gate, activation)
    activated, quantized_up = of_activation.forward(raw), of_up.forward(up)
    return [quantized_gate, raw, activated, quantized_up, (activated * quantized_up).contiguous()]


def _quantized_glu(gate: Tensor, up: Tensor, activation: int, *arguments) -> Tensor:
    quantizers = _check_glu(gate, up, activation, arguments)
    *_, product = _glu_steps(gate, up, activation, quantizers)
    return quantizers[3].forward(product)


def _quantized_glu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: int, *rest
) -> tuple[Tensor | None, ...]:
    *arguments, needs = rest
    checks.check_grad("quantized_glu", "gate", grad, gate)
    quantizers = _check_glu(gate, up, activation, arguments)
    of_gate, of_activation, of_up, of_product = quantizers
    quantized_gate, raw, activated, quantized_up, product = _glu_steps(
        gate, up, activation, quantizers
    )
    dproduct, *product_range = of_product.backward(grad, product, needs[8:])
    dup, *up_range = of_up.backward(dproduct * activated, up, needs[6:8])
    draw, *activation_range = of_activation.backward(dproduct * quantized_up, raw, needs[4:6])
    dquantized_gate = _activated_backward(draw.contiguous(), quantized_gate, activation)
    dgate, *gate_range = of_gate.backward(dquantized_gate, gate, needs[2:4])
    dgate = dgate.contiguous() if needs[0] else None
    dup = dup.contiguous() if needs[1] else None
    return dgate, dup, *gate_range, *activation_range, *up_range, *product_range


KERNELS: dict[str, Callable] = {
    "_quantized_gelu": _quantized_gelu,
    "_quantized_gelu_backward": _quantized_gelu_backward,
    "_quantized_attention": _quantized_attention,
    "_quantized_attention_backward": _quantized_attention_backward,
    "_quantized_softmax": _quantized_softmax,
    "_quantized_softmax_backward": _quantized_softmax_backward,
    "_quantized_cross_entropy": _quantized_cross_entropy,
    "_quantized_cross_entropy_backward": _quantized_cross_entropy_backward,
    "_quantized_kl_div": _quantized_kl_div,
    "_quantized_kl_div_backward": _quantized_kl_div_backward,
    "_quantized_rms_norm": _quantized_rms_norm,
    "_quantized_rms_norm_backward": _quantized_rms_norm_backward,
    "_quantized_glu": _quantized_glu,
    "_quantized_glu_backward": _quantized_glu_backward,
}
