"""The operators: fake-quantize with learnable ranges, quantize, update_codes_, dequantize.

Common to all functions:

- ``x`` is float32, float64, bfloat16 or float16, of any strides and up to 16 dimensions, on CPU or
  CUDA. The result has x's shape and dtype and the strides of ``torch.empty_like(x)``.
- Range tensors are float32 (float64 allowed where x is float64), on x's device, all of one shape,
  which is the granularity: one element (per tensor), or x's number of dimensions with each size 1,
  x's size there, or a divisor of it (blocks). ``[C, 1]`` is per row, ``[1, C]`` per column,
  ``[C, K // G]`` groups of G along the last axis.
- ``bits`` is 2 to 16; k = 2**bits - 1.
- ``eps`` is the least effective scale: s = max(raw s, eps). The gradient passes straight through.
- ``full_range`` gives a symmetric grid one more step below zero: codes -(k+1)/2 to (k-1)/2, such as
  -8 to 7 with 4 bits, and k + 1 for k in the scale.
- ``link`` is f, of which a learned factor v is applied as f(v): "identity" v, "sigmoid" σ(v)
  (which ``sigmoid=True`` asks for, too), "exp" e^v, "softplus" log(1 + e^v), or "clamp", v held in
  [1/4, 4], whose gradient passes straight through. It is computed in float64 and rounded once.
- ``gradient_scale`` is positive: the gradients of the learned parameters are multiplied by it.
- A grid starts at s·rint(z): torch's ``zero_point`` is -rint(z) with quant_min 0, quant_max k.
- Gradients are the straight-through ones of eq. 1 of "How to Parameterize Asymmetric Quantization
  Ranges for Quantization-Aware Training". NaN counts as inside the range, infinities saturate.
- Arguments that do not fit raise RuntimeError, second derivatives too, and torch.func's transforms
  that differentiate: `asymq.reference` is what these can be taken of.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

_ops = torch.ops.asymq
_scale_offset = _ops.fake_quantize_scale_offset.default
_min_max = _ops.fake_quantize_min_max.default
_beta_gamma = _ops.fake_quantize_beta_gamma.default
_kscale_koffset = _ops.fake_quantize_kscale_koffset.default
_symmetric_scale = _ops.fake_quantize_symmetric_scale.default
_symmetric_max = _ops.fake_quantize_symmetric_max.default
_symmetric_gamma = _ops.fake_quantize_symmetric_gamma.default
_dynamic_beta_gamma = _ops.fake_quantize_dynamic_beta_gamma.default
_dynamic_symmetric_gamma = _ops.fake_quantize_dynamic_symmetric_gamma.default
_live = _ops._fake_quantize_live.default
_quantize = _ops.quantize.default
_update_codes_ = _ops.update_codes_.default
_dequantize = _ops.dequantize.default
_effective_scale_offset = _ops.effective_scale_offset.default
_range_of_extrema = _ops.range_of_extrema.default
_quantized_softmax = _ops.quantized_softmax.default
_quantized_attention = _ops.quantized_attention.default
_quantized_gelu = _ops.quantized_gelu.default
_quantized_cross_entropy = _ops.quantized_cross_entropy.default
_quantized_rms_norm = _ops.quantized_rms_norm.default
_quantized_glu = _ops.quantized_glu.default
_quantized_kl_div = _ops.quantized_kl_div.default


def fake_quantize_scale_offset(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    *,
    bits: int,
    eps: float = 1e-8,
    gradient_scale: float = 1.0,
) -> Tensor:
    """x̂ = s·clip(rint(x/s), rint(z), rint(z) + k) with learned scale s and offset z (eq. 1)."""
    return _scale_offset(x, scale, offset, bits, eps, gradient_scale)


def fake_quantize_min_max(
    x: Tensor,
    min: Tensor,
    max: Tensor,
    *,
    bits: int,
    eps: float = 1e-8,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Learned ends of the range: s = (max - min)/k, z = min/s (eq. 1)."""
    return _min_max(x, min, max, bits, eps, gradient_scale)


def fake_quantize_beta_gamma(
    x: Tensor,
    beta: Tensor,
    gamma: Tensor,
    min: Tensor,
    max: Tensor,
    *,
    bits: int,
    sigmoid: bool = False,
    eps: float = 1e-8,
    link: str = "identity",
    gradient_scale: float = 1.0,
) -> Tensor:
    """Learned factors on constant ends: the range is f(β)·min to f(γ)·max (eq. 3), where f is the
    ``link``. ``min`` and ``max`` must not require grad.
    """
    return _beta_gamma(x, beta, gamma, min, max, bits, sigmoid, eps, link, gradient_scale)


def fake_quantize_kscale_koffset(
    x: Tensor,
    kscale: Tensor,
    koffset: Tensor,
    *,
    bits: int,
    eps: float = 1e-8,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Learned scale and offset freed of the bit width: s = kscale/k, z = k·koffset (eq. 9)."""
    return _kscale_koffset(x, kscale, koffset, bits, eps, gradient_scale)


def fake_quantize_symmetric_scale(
    x: Tensor,
    scale: Tensor,
    *,
    bits: int,
    eps: float = 1e-8,
    full_range: bool = False,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Symmetric grid of indices -(k-1)/2 to (k-1)/2 with a learned scale s (eq. 10)."""
    return _symmetric_scale(x, scale, bits, eps, full_range, gradient_scale)


def fake_quantize_symmetric_max(
    x: Tensor,
    max: Tensor,
    *,
    bits: int,
    eps: float = 1e-8,
    full_range: bool = False,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Symmetric grid with a learned end: s = 2·max/k (Table 3)."""
    return _symmetric_max(x, max, bits, eps, full_range, gradient_scale)


def fake_quantize_symmetric_gamma(
    x: Tensor,
    gamma: Tensor,
    max: Tensor,
    *,
    bits: int,
    sigmoid: bool = False,
    eps: float = 1e-8,
    full_range: bool = False,
    link: str = "identity",
    gradient_scale: float = 1.0,
) -> Tensor:
    """Symmetric grid with a learned factor on a constant end: s = 2f(γ)·max/k (Table 3), where f is
    the ``link``. ``max`` must not require grad.
    """
    return _symmetric_gamma(x, gamma, max, bits, sigmoid, eps, full_range, link, gradient_scale)


def fake_quantize_dynamic_beta_gamma(
    x: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    group: int | None = None,
    bits: int,
    sigmoid: bool = False,
    eps: float = 1e-8,
    link: str = "identity",
    gradient_scale: float = 1.0,
) -> Tensor:
    """Learned factors on the live range of every token (eq. 3).

    x is [..., D]. Each ``group`` of consecutive elements of the last axis (None: all D, the token)
    has the range of its own elements with zero in it: θmin = min(0, min x), θmax = max(0, max x),
    s = (γθmax - βθmin)/k and z = βθmin/s, with f(β) and f(γ) for them where there is a ``link``.
    θmin and θmax are constants to the gradient.

    beta, gamma: of one shape, with one value or D/group (one per position in the token), which all
    tokens share. A NaN or infinity makes its own group NaN and no other. Saves x alone.
    """
    return _dynamic_beta_gamma(x, beta, gamma, group, bits, sigmoid, eps, link, gradient_scale)


def fake_quantize_dynamic_symmetric_gamma(
    x: Tensor,
    gamma: Tensor,
    *,
    group: int | None = None,
    bits: int,
    sigmoid: bool = False,
    full_range: bool = False,
    eps: float = 1e-8,
    link: str = "identity",
    gradient_scale: float = 1.0,
) -> Tensor:
    """:func:`fake_quantize_dynamic_beta_gamma` with a symmetric grid: θmax = max |x|, s = γθmax/h
    with h = (k-1)/2, so that at γ = 1 the largest element is on the grid; in full range (k+1)/2.
    """
    return _dynamic_symmetric_gamma(
        x, gamma, group, bits, sigmoid, full_range, eps, link, gradient_scale
    )


def _fake_quantize_live(
    x: Tensor,
    *factors: Tensor,
    group: int | None,
    bits: int,
    symmetric: bool = False,
    sigmoid: bool = False,
    full_range: bool = False,
    eps: float = 1e-8,
    link: str = "identity",
    gradient_scale: float = 1.0,
) -> Tensor:
    """A weight on the live range of its rows or groups: fake_quantize_beta_gamma, or its symmetric
    counterpart, with the extrema of every group of x (max(-min, max) if symmetric) as constants.

    factors: beta and gamma, or gamma; one value, one for every group of a row, or one for every
    group, in the order of the groups.
    """
    first, second = factors if not symmetric else (*factors, None)
    return _live(x, first, second, group, bits, sigmoid, full_range, eps, link, gradient_scale)


def quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    bits: int,
    eps: float = 1e-8,
    full_range: bool = False,
) -> Tensor:
    """Integer codes, without gradient. NaN gives code 0.

    With ``offset`` clip(rint(x/s) - rint(z), 0, k): uint8 up to 8 bits, else int32. Without
    (symmetric) clip(rint(x/s), -(k-1)/2, (k-1)/2), with ``full_range`` from -(k+1)/2: int8 up to 8
    bits, else int16.
    """
    return _quantize(x, scale, offset, bits, eps, full_range)


def update_codes_(
    codes: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    bits: int,
    eps: float = 1e-8,
    full_range: bool = False,
) -> Tensor:
    """Overwrites ``codes``, of the shape and dtype that :func:`quantize` gives for x, with x's
    codes, in one pass, and returns how many of them changed: int64, 0-d, on x's device.
    """
    return _update_codes_(codes, x, scale, offset, bits, eps, full_range)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    bits: int,
    eps: float = 1e-8,
    full_range: bool = False,
) -> Tensor:
    """The values s·(code + rint(z)) of codes of :func:`quantize`, in scale's dtype, no gradient."""
    return _dequantize(codes, scale, offset, bits, eps, full_range)


def effective_scale_offset(
    parameterization: str,
    *parameters: Tensor,
    bits: int,
    symmetric: bool = False,
    sigmoid: bool = False,
    eps: float = 1e-8,
    full_range: bool = False,
    link: str = "identity",
) -> tuple[Tensor, Tensor | None]:
    """Guarded scale and offset (None if symmetric) of a parameterization, without gradient.

    ``parameterization`` is "scale_offset", "min_max", "beta_gamma" or "kscale_koffset"; with
    ``symmetric`` the counterpart that learns s, θmax or γ. ``parameters`` are its tensors in the
    order of the function of that name, constants included.
    """
    result = _effective_scale_offset(
        parameterization, parameters, bits, symmetric, sigmoid, eps, full_range, link
    )
    return result[0], (None if symmetric else result[1])


def range_of_extrema(
    min: Tensor,
    max: Tensor,
    *,
    bits: int,
    symmetric: bool = False,
    force_zero: bool = True,
    fallback: float = 1.0,
    eps: float = 1e-8,
    full_range: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The range to start learning from where ``min`` and ``max`` are the smallest and largest value
    seen, and where it has to be a guess: (min, max, without_width).

    ``symmetric``: ±max(-min, max). Else [min, max], with zero put inside if ``force_zero``, and
    otherwise only where the values do not vary (by no more than 1e-6 of the larger end). Where all
    values seen were 0, ±fallback. No range is narrower than k·eps ((k+1)·eps in full range).
    ``without_width`` (bool) tells where one of the last two rules decided.

    min, max: float32 or float64, of one shape, dtype and device, and finite: that is the caller's
    to see to. Without gradient.
    """
    return _range_of_extrema(min, max, bits, symmetric, force_zero, fallback, eps, full_range)


class RangeArguments(NamedTuple):
    """A quantizer with one range: a parameterization, its tensors (constants included, one element
    each) in the order of the function of that name, and what else effective_scale_offset takes.

    ``token``: a range of each token, as ``fake_quantize_dynamic_*`` have it: of "beta_gamma", with
    the factors alone for parameters, and ``group``. quantized_rms_norm and quantized_glu take it.
    """

    parameterization: str
    parameters: tuple[Tensor, ...]
    bits: int
    symmetric: bool = False
    sigmoid: bool = False
    eps: float = 1e-8
    full_range: bool = False
    token: bool = False
    group: int | None = None
    link: str = "identity"
    gradient_scale: float = 1.0


# What the operators take that can do without a range.
_NO_RANGE = RangeArguments("none", (), bits=8)


def quantized_softmax(
    scores: Tensor,
    mask: Tensor | None,
    scores_range: RangeArguments,
    probabilities_range: RangeArguments,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Attention's quantized probabilities in one kernel each way: fake-quantizes the scores, masks
    them, takes the softmax over the keys, fake-quantizes it, and gives hidden keys 0 (a range whose
    lower end is positive would lift them above it).

    scores: [batch, heads, queries, keys]. All arithmetic is in float32 (float64 for float64
    scores), rounded to the scores' dtype once, at the end. mask: bool (True: the query sees the
    key) or floating (added to the quantized scores; -1e4 and less, as its dtype has it, hides the
    key, and what is above, such as ALiBi's biases, makes scores), broadcast against the scores,
    without gradient. causal: query q sees keys up to q + keys - queries, in addition to the mask;
    with a window, of those the last `window` alone (sliding attention). A query that sees no key
    has the probability 0 for all, and no gradient. Dense in memory, whatever the scores' strides.

    Differentiable with respect to scores and learned parameters, straight-through at both
    quantizers; saves the scores and two numbers per row.
    """
    return _quantized_softmax(scores, mask, causal, *scores_range, *probabilities_range, window)


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores_range: RangeArguments,
    probabilities_range: RangeArguments,
    *,
    scaling: float | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """probabilities @ value, where the probabilities are :func:`quantized_softmax` of the scores
    scaling * query @ keyᵀ; mask, causal and window are its own.

    query: [batch, heads, queries, width]. key: [batch, key heads, keys, width]. value: [batch, key
    heads, keys, value width]. All of one dtype; a key head serves heads / key heads consecutive
    ones. scaling: None is width**-0.5. The result [batch, heads, queries, value width] has the
    memory of [batch, queries, heads, value width].

    On CUDA of compute capability 8.0 and later, neither scores nor probabilities come to memory,
    forward or backward, of bfloat16, float16, and float32 where torch allows TF32 in products, with
    heads of up to 128 elements whose rows are multiples of 16 bytes. Scores are then not rounded to
    the dtype. Elsewhere both do, one after the other.

    Differentiable with respect to query, key, value and learned parameters, straight-through at
    both quantizers; saves these, the result and two numbers per query. Repeats bit for bit.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    ranges = (*scores_range, *probabilities_range)
    return _quantized_attention(query, key, value, mask, causal, scaling, *ranges, window)


def quantized_gelu(x: Tensor, input_range: RangeArguments, output_range: RangeArguments) -> Tensor:
    """fake_quantize(gelu(fake_quantize(x))) in one kernel each way, with the tanh approximation of
    GELU (torch's ``approximate="tanh"``, transformers' "gelu_new").

    x: of any shape and strides. All arithmetic is in float32 (float64 for float64 x), rounded to
    x's dtype once, at the end. Differentiable with respect to x and learned parameters,
    straight-through at both quantizers; saves x alone.
    """
    return _quantized_gelu(x, *input_range, *output_range)


def quantized_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    range: RangeArguments,
    *,
    ignore_index: int = -100,
    classes: int | None = None,
) -> Tensor:
    """The loss of every row, -log softmax(fake_quantize(logits))[label], on CUDA in one kernel each
    way; 0 where the label is ``ignore_index``.

    logits: [tokens, classes]. labels: [tokens], int64. Returns [tokens] in float32 (float64 for
    float64 logits), which is also what all arithmetic is in. A label that is neither a class nor
    ``ignore_index`` raises IndexError on the CPU; on CUDA its row's loss and gradients are NaN.
    classes: where there are fewer than columns, the rest makes rows start aligned: it counts for
    nothing, and its gradient is 0.

    Differentiable with respect to logits and learned parameters; saves the logits and two numbers
    per row.
    """
    return _quantized_cross_entropy(logits, labels, ignore_index, *range, classes)


def quantized_rms_norm(
    x: Tensor, weight: Tensor, output_range: RangeArguments | None, *, eps: float = 1e-6
) -> Tensor:
    """fake_quantize(weight * x / sqrt(mean(x**2) + eps)) over the last axis, as transformers'
    LlamaRMSNorm computes it: the quotient in float32 (float64 for float64 x), rounded to x's dtype,
    times weight. Without a range the result is not quantized.

    x: [..., D], any strides. weight: [D], of x's dtype; where it has a quantizer, already
    quantized. The result is contiguous. On CUDA one kernel each way, where D is a multiple of 16
    bytes up to 32 KiB and the range is none, one, or that of the whole token.

    Differentiable with respect to x, weight and learned parameters; saves x, weight and one number
    per row.
    """
    return _quantized_rms_norm(x, weight, eps, *(output_range or _NO_RANGE))


def quantized_glu(
    gate: Tensor,
    up: Tensor,
    product_range: RangeArguments | None,
    *,
    activation: Literal["silu", "gelu_tanh"] = "silu",
    gate_range: RangeArguments | None = None,
    activation_range: RangeArguments | None = None,
    up_range: RangeArguments | None = None,
) -> Tensor:
    """product(activation(act(gate(g))) * up(u)): a gated linear unit whose operands, activation and
    product are quantized, each on its range or, without one, not at all.

    gate, up: [..., D], of one shape and dtype, any strides. act: SiLU or GELU's tanh approximation.
    The arithmetic is in float32 (float64 for float64 tensors), every step rounded to the tensors'
    dtype as single operations round it. The result is contiguous. On CUDA one kernel each way,
    where D is a multiple of 16 bytes, the product's range is none, one, or that of the whole token,
    and there are no others.

    Differentiable with respect to both tensors and learned parameters; saves both tensors alone.
    """
    ranges = gate_range, activation_range, up_range, product_range
    flat = [part for range in ranges for part in range or _NO_RANGE]
    return _quantized_glu(gate, up, activation, *flat)


def quantized_kl_div(
    logits: Tensor,
    teacher_logits: Tensor,
    range: RangeArguments,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    classes: int | None = None,
) -> Tensor:
    """The loss of distillation of every row (Hinton et al. 2015), T²·Σ p·(log p - log q) with p =
    softmax(teacher_logits/T) and q = softmax(fake_quantize(logits)/T), on CUDA in one kernel each
    way; 0 where the label is ``ignore_index``.

    logits, teacher_logits: [tokens, classes], of one dtype, the teacher's without gradient. labels:
    [tokens], int64; without them every row counts, and no other label than ``ignore_index`` means
    anything. temperature: T. Returns [tokens] in float32 (float64 for float64 logits), which is
    also what all arithmetic is in. classes: where there are fewer than columns of the logits, the
    rest makes rows start aligned: it counts for nothing, and its gradient is 0. The teacher's have
    no such columns.

    Differentiable with respect to logits (T·(q - p), straight-through) and learned parameters;
    saves both logits and four numbers per row.
    """
    how = temperature, ignore_index, *range, classes
    return _quantized_kl_div(logits, teacher_logits, labels, *how)
