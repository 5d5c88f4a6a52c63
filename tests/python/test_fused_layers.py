"""One kernel for a norm or a gated product and the quantizer after it, in models."""

import copy

import pytest
import torch
from operator_calls import OperatorCalls
from support.tiny_models import DECODERS, logits, next_token_loss, prepared, tokens

import asymq
from asymq import QuantConfig
from asymq.quantizers import sharing

transformers = pytest.importorskip("transformers", minversion="5.4")

RECIPES = {
    "w8a8": QuantConfig.w8a8(),
    "w4a8": QuantConfig.w4a8(group=16, cache=8),
    "npu": QuantConfig.npu(activation=8),
}


@pytest.fixture(scope="module")
def models():
    """Prepared once: (family, recipe) -> a copy."""
    made = {}

    def of(family: str, recipe: str):
        if (family, recipe) not in made:
            made[family, recipe] = prepared(DECODERS[family](), RECIPES[recipe])
        return copy.deepcopy(made[family, recipe])

    return of


def counts(model, call=None) -> tuple[int, int]:
    """How many norms and gated products a forward computes in one."""
    with torch.no_grad(), OperatorCalls() as recorder:
        (call or (lambda: model(tokens())))()
    names = [function.__name__ for function, _ in recorder.calls]
    return tuple(names.count(f"_quantized_{what}.default") for what in ("rms_norm", "glu"))


@pytest.mark.parametrize(
    "family, recipe, expected",
    [
        ("llama", "w8a8", (4, 2)),
        ("llama", "npu", (5, 0)),
        ("mistral", "w4a8", (4, 2)),
        ("qwen2", "w8a8", (4, 2)),
        # And the norms of queries and keys; a gate, its activation and up have quantizers here.
        ("qwen3", "npu", (9, 0)),
        # A single layer is given what the norm gives, and quantizes it itself.
        ("phi3", "w8a8", (0, 2)),
        # Another arithmetic: 1 + weight.
        ("gemma", "w8a8", (0, 2)),
        ("gemma2", "npu", (0, 0)),
    ],
)
def test_what_is_one_kernel(models, family, recipe, expected):
    model = models(family, recipe)
    assert counts(model) == expected
    with asymq.use_functions("unfused"):
        assert counts(model) == (0, 0)
    asymq.disable_quantizers(model)
    assert counts(model) == (0, 0)


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    next_token_loss(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=str)
@pytest.mark.parametrize("family, recipe", [("llama", "w8a8"), ("llama", "npu"), ("phi3", "w4a8")])
def test_it_changes_nothing(models, family, recipe, checkpointing):
    """checkpointing: reentrant or not, or none."""
    model, batch = models(family, recipe).train(), tokens()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()  # without which a reentrant one differentiates nothing
    fused = gradients(model, batch)
    with asymq.use_functions("unfused"):
        unfused = gradients(model, batch)
    assert fused.keys() == unfused.keys()
    for name, gradient in fused.items():
        torch.testing.assert_close(gradient, unfused[name], rtol=1e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(
        logits(model.eval(), batch), unfused_logits(model, batch), rtol=1e-4, atol=1e-4
    )


def unfused_logits(model, batch):
    with asymq.use_functions("unfused"):
        return logits(model, batch)


@pytest.mark.parametrize(
    "place, expected",
    [
        ("input_layernorm", (3, 2)),
        ("self_attn", (3, 2)),
        ("self_attn.k_proj", (3, 2)),
        ("self_attn.q_proj.input_quantizer", (3, 2)),
        ("mlp.gate_proj", (3, 2)),
        ("mlp.act_fn", (4, 1)),
        ("mlp.down_proj", (4, 1)),
        ("mlp.down_proj.input_quantizer", (4, 1)),
    ],
)
def test_who_looks_sees_what_was(models, place, expected):
    """A hook is given what it would be given of single operations."""
    model = models("llama", "w8a8")
    seen = []
    module = model.model.layers[1].get_submodule(place)
    module.register_forward_hook(lambda module, args, kwargs, y: seen.append(y), with_kwargs=True)
    assert counts(model) == expected  # only what the hook could notice is taken apart
    with asymq.use_functions("unfused"):
        logits(model, tokens())
    results = [y[0] if isinstance(y, tuple) else y for y in seen]
    half = len(results) // 2
    assert half > 0
    for first, second in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_observing_and_uncalibrated(models):
    model = models("llama", "w8a8")
    quantizer = model.model.layers[0].self_attn.q_proj.input_quantizer
    quantizer.state = "observing"
    assert counts(model)[0] == 3
    quantizer.state = "off"
    assert counts(model)[0] == 3


def test_a_layer_alone_quantizes_by_itself(models):
    """Outside of a model's forward nothing is shared."""
    model = models("llama", "w8a8")
    layer = model.model.layers[0]
    x = torch.randn(2, 12, 32)
    positions = model.model.rotary_emb(x, torch.arange(12)[None])
    call = lambda: layer(x, position_embeddings=positions)  # noqa: E731
    assert counts(model, call) == (0, 1)
    with torch.no_grad():
        alone = call()
        with sharing():
            shared = call()
    torch.testing.assert_close(alone, shared, rtol=1e-5, atol=1e-5)


def test_a_tensor_that_does_not_arrive():
    """What is quantized in advance reaches everyone, or it is an error."""
    model = prepared(DECODERS["llama"](), RECIPES["w8a8"])
    quantizer = model.model.layers[0].self_attn.q_proj.input_quantizer
    x = torch.randn(3, 32)
    with torch.no_grad(), sharing():
        with quantizer.provided(x):
            assert all(quantizer(x) is x for _ in range(3))
        assert quantizer(x) is not x
        with pytest.raises(RuntimeError, match="did not reach all of its layers"):
            with quantizer.provided(x):
                quantizer(x)
        with pytest.raises(KeyError):
            with quantizer.provided(x):
                raise KeyError
        assert quantizer(x) is not x


def test_compiled(models):
    model, batch = models("llama", "w8a8"), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = logits(model, batch)
    torch.testing.assert_close(logits(compiled, batch), expected, rtol=1e-4, atol=1e-4)
