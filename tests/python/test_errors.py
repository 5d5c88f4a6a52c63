"""Every message names the operator, the argument, what it needs and what it got."""

import re

import pytest
import torch

import asymq

pytestmark = pytest.mark.composite


def t(*shape, dtype=torch.float32, device="cpu", requires_grad=False):
    return torch.ones(shape, dtype=dtype, device=device, requires_grad=requires_grad)


X = t(2, 3)
ONE = t(1)
HALF = t(1, dtype=torch.bfloat16)
DOUBLE = t(1, dtype=torch.float64)
LEAF = t(1, requires_grad=True)
CODES = t(2, 3, dtype=torch.uint8)

MIN_MAX = "fake_quantize_min_max"
BETA_GAMMA = "fake_quantize_beta_gamma"
GAMMA = "fake_quantize_symmetric_gamma"
TOKEN = "fake_quantize_dynamic_beta_gamma"
TOKEN_GAMMA = "fake_quantize_dynamic_symmetric_gamma"

# Every fake-quantize, and its range tensors.
LEARNED = (
    ("fake_quantize_scale_offset", 2),
    (MIN_MAX, 2),
    (BETA_GAMMA, 4),
    ("fake_quantize_kscale_koffset", 2),
    ("fake_quantize_symmetric_scale", 1),
    ("fake_quantize_symmetric_max", 1),
    (GAMMA, 2),
    (TOKEN, 2),
    (TOKEN_GAMMA, 1),
)
# (operator, tensors, changed keywords, message after "asymq::<operator>: ")
ERRORS = [
    *(
        (name, (X, *(ONE,) * ranges), {"bits": bits}, f"bits must be between 2 and 16, got {bits}")
        for bits in (1, 17, -8)
        for name, ranges in (*LEARNED, ("quantize", 2))
    ),
    ("dequantize", (CODES, ONE, ONE), {"bits": 0}, "bits must be between 2 and 16, got 0"),
    (MIN_MAX, (X, ONE, ONE), {"eps": -1.0}, "eps must be positive and finite, got -1"),
    (MIN_MAX, (X, ONE, ONE), {"eps": 0.0}, "eps must be positive and finite, got 0"),
    (MIN_MAX, (X, ONE, ONE), {"eps": float("inf")}, "eps must be positive and finite, got inf"),
    (MIN_MAX, (X, ONE, ONE), {"eps": float("nan")}, "eps must be positive and finite, got -?nan"),
    (
        MIN_MAX,
        (X.long(), ONE, ONE),
        {},
        "x must be float32, float64, bfloat16 or float16, got Long",
    ),
    ("quantize", (CODES, ONE), {}, "x must be float32, float64, bfloat16 or float16, got Byte"),
    (MIN_MAX, (X, HALF, HALF), {}, "min must be float32, got BFloat16"),
    (MIN_MAX, (X, DOUBLE, DOUBLE), {}, "min must be float32, got Double"),
    (MIN_MAX, (X.double(), HALF, HALF), {}, "min must be float32 or float64, got BFloat16"),
    (MIN_MAX, (X.double(), ONE, DOUBLE), {}, "max must have min's dtype Float, got Double"),
    (BETA_GAMMA, (X.double(), ONE, ONE, ONE, DOUBLE), {}, "max must have beta's dtype Float"),
    ("quantize", (X, DOUBLE), {}, "scale must be float32, got Double"),
    (MIN_MAX, (X, ONE, t(2)), {}, r"max must have min's shape \[1\], got \[2\]"),
    (BETA_GAMMA, (X, ONE, ONE, ONE, t(2, 1)), {}, r"max must have beta's shape \[1\]"),
    ("quantize", (X, ONE, t(2, 1)), {}, r"offset must have scale's shape \[1\], got \[2, 1\]"),
    (
        MIN_MAX,
        (t(512, 768), t(1, 1024), t(1, 1024)),
        {},
        r"min has shape \[1, 1024\], which does not divide x's shape \[512, 768\] at axis 1",
    ),
    (
        "fake_quantize_symmetric_scale",
        (X, t(0, 1)),
        {},
        r"scale has shape \[0, 1\], which does not divide x's shape \[2, 3\] at axis 0",
    ),
    (
        MIN_MAX,
        (X, t(3), t(3)),
        {},
        r"min has shape \[3\]: it must have one element or as many dimensions as x, "
        r"whose shape is \[2, 3\]",
    ),
    (
        "dequantize",
        (CODES, t(2, 2)),
        {"bits": 8},
        r"codes must be .* for 8 bits without offset, got Byte",
    ),
    (
        "update_codes_",
        (CODES, X, ONE),
        {},
        r"codes must be .* for 8 bits without offset, got Byte",
    ),
    (
        "update_codes_",
        (CODES, X, ONE, ONE),
        {"bits": 9},
        r"codes must be Int for 9 bits with offset, got Byte",
    ),
    (
        "update_codes_",
        (CODES, t(3, 2), ONE, ONE),
        {},
        r"codes must have x's shape \[3, 2\], got \[2, 3\]",
    ),
    (
        "update_codes_",
        (t(2, 3, dtype=torch.uint8, device="meta"), X, ONE, ONE),
        {},
        "codes must be on x's device cpu, got meta",
    ),
    (
        "dequantize",
        (CODES, t(2, 2), t(2, 2)),
        {},
        r"scale has shape \[2, 2\], which does not divide",
    ),
    (
        MIN_MAX,
        (X, t(1, device="meta"), t(1, device="meta")),
        {},
        "min must be on x's device cpu, got meta",
    ),
    (MIN_MAX, (X, ONE, t(1, device="meta")), {}, "max must be on min's device cpu, got meta"),
    (
        BETA_GAMMA,
        (X, ONE, ONE, LEAF, ONE),
        {},
        "min must not require grad: it is a constant of this parameterization",
    ),
    (BETA_GAMMA, (X, ONE, ONE, ONE, LEAF), {}, "max must not require grad"),
    (GAMMA, (X, ONE, LEAF), {}, "max must not require grad"),
    ("quantize", (X, ONE, ONE), {"full_range": True}, "full_range needs a symmetric grid"),
    ("dequantize", (CODES, ONE, ONE), {"full_range": True}, "full_range needs a symmetric grid"),
    (TOKEN, (t(), ONE, ONE), {}, r"x must have at least one dimension, .* got shape \[\]"),
    (TOKEN, (X, ONE, ONE), {"group": 0}, "group must be at least 1, .* got 0"),
    (TOKEN_GAMMA, (X, ONE), {"group": 2}, "group must divide x's last axis of 3 elements, got 2"),
    (
        TOKEN,
        (X, t(2), t(2)),
        {},
        r"beta must have 1 value or one for each of the 1 groups of a row, .* got shape \[2\] for "
        r"x's shape \[2, 3\]",
    ),
    (TOKEN_GAMMA, (X, t(2, 3)), {"group": 1}, r"gamma must have 1 value or .* got shape \[2, 3\]"),
    (TOKEN, (X, ONE, t(2)), {}, r"gamma must have beta's shape \[1\], got \[2\]"),
    (TOKEN, (X.long(), ONE, ONE), {}, "x must be float32, float64, bfloat16 or float16, got Long"),
    (TOKEN, (X, HALF, HALF), {}, "beta must be float32, got BFloat16"),
    (TOKEN_GAMMA, (X, DOUBLE), {}, "gamma must be float32, got Double"),
    (TOKEN, (X, ONE, ONE), {"eps": 0.0}, "eps must be positive and finite, got 0"),
    (TOKEN_GAMMA, (X, t(1, device="meta")), {}, "gamma must be on x's device cpu, got meta"),
    *(
        (name, (X, *(ONE,) * ranges), keywords, message)
        for name, ranges in ((BETA_GAMMA, 4), (GAMMA, 2), (TOKEN, 2), (TOKEN_GAMMA, 1))
        for keywords, message in (
            (
                {"link": "tanh"},
                "link must be identity, sigmoid, exp, softplus or clamp, got tanh",
            ),
            (
                {"sigmoid": True, "link": "exp"},
                "sigmoid is a link itself: .* got sigmoid and the link exp",
            ),
        )
    ),
    *(
        (
            name,
            (X, *(ONE,) * ranges),
            {"gradient_scale": scale},
            f"gradient_scale must be positive and finite, got {got}",
        )
        for scale, got in ((0.0, "0"), (-0.5, "-0.5"), (float("inf"), "inf"))
        for name, ranges in LEARNED
    ),
]


def _identity(case):
    name, tensors, keywords, _ = case
    return "-".join([name, *(str(list(v.shape)) for v in tensors), *map(str, keywords.values())])


@pytest.mark.parametrize("namespace", [asymq, torch.ops.asymq], ids=["python", "dispatcher"])
@pytest.mark.parametrize("case", ERRORS, ids=_identity)
def test_message(namespace, case):
    name, tensors, keywords, message = case
    if name in ("quantize", "dequantize", "update_codes_"):
        keywords = {"offset": None, **keywords}
        if len(tensors) > (name == "update_codes_") + 2:
            *tensors, keywords["offset"] = tensors
    if "_dynamic_" in name:
        keywords = {"group": None, **keywords}
    with pytest.raises(RuntimeError, match=f"asymq::{name}: {message}"):
        getattr(namespace, name)(*tensors, **{"bits": 8, **keywords})


@pytest.mark.parametrize(
    "name, tensors, keywords, message",
    [
        ("minmax", (ONE, ONE), {}, "minmax"),
        ("kscale_koffset", (ONE,), {"symmetric": True}, "kscale_koffset"),
        ("min_max", (ONE, ONE), {"sigmoid": True}, "sigmoid|min_max"),
        ("min_max", (ONE, ONE), {"link": "exp"}, "link belongs to .* beta_gamma, got .* exp"),
        (
            "min_max",
            (ONE, ONE),
            {"full_range": True},
            "full_range belongs to symmetric.*got min_max",
        ),
        ("min_max", (ONE,), {}, "min_max"),
        ("min_max", (ONE, ONE, ONE), {}, "min_max"),
        ("min_max", (ONE, ONE), {"bits": 20}, "bits must be between 2 and 16, got 20"),
        ("min_max", (ONE, t(2)), {}, r"max must have min's shape \[1\], got \[2\]"),
        ("min_max", (HALF, HALF), {}, "min must be float32 or float64, got BFloat16"),
    ],
)
def test_effective_scale_offset(name, tensors, keywords, message):
    with pytest.raises((RuntimeError, ValueError), match="asymq::effective_scale_offset") as error:
        asymq.effective_scale_offset(name, *tensors, **{"bits": 8, **keywords})
    assert re.search(message, str(error.value))


def test_everything_after_the_tensors_is_keyword_only():
    with pytest.raises(TypeError):
        asymq.fake_quantize_min_max(X, ONE, ONE, 8)
    with pytest.raises(TypeError):
        asymq.fake_quantize_min_max(X, ONE, ONE)
