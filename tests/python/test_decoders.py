"""Decoders of Llama's kind, mixtures of experts and encoders: where quantizers are, and what the
models compute with them."""

import copy
import pickle
import subprocess
import sys
import threading
import warnings
from inspect import signature

import pytest
import torch
from compare import assert_bit_equal
from tiny_models import (
    DECODERS,
    MIXTURES,
    logits,
    next_token_loss,
    prepared,
    tokens,
    train,
    transformers,
)
from torch import nn
from transformers import masking_utils

import asymq
from asymq import PerChannel, PerGroup, QuantConfig, QuantSpec
from asymq.layers import attention
from asymq.models.decoder import gated_mlp_of, layer_of
from asymq.models.steps import read
from asymq.quantizers import named_quantizers

TABLE2 = QuantConfig.table2("beta_gamma")
BYTE = QuantSpec(8, parameterization="min_max")
WEIGHTS = QuantConfig(QuantSpec(4, symmetric=True, granularity=PerChannel()))

# All activation sites of a layer, in order, and how many other families have.
LLAMA_LAYER = """
input_layernorm.output
self_attn.q_proj.output self_attn.k_proj.output
self_attn.query self_attn.key self_attn.value
self_attn.scores self_attn.probabilities self_attn.context
self_attn.o_proj.output
attention_sum
post_attention_layernorm.output
mlp.gate_proj.output mlp.act_fn.output mlp.up_proj.output
mlp.product
mlp.down_proj.output
mlp_sum
""".split()
COUNTS = dict.fromkeys(DECODERS, 18) | {
    "qwen3": 20, "gemma2": 20, "gemma3": 22, "olmo2": 20, "phi3": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def calibrated():
    """A copy of the calibrated model of a family, of which there is one."""
    models = {}

    def get(family):
        if family not in models:
            with warnings.catch_warnings():
                # Of a decoder everything is quantized.
                warnings.simplefilter("error" if family in DECODERS else "ignore")
                models[family] = prepared((DECODERS | MIXTURES)[family]())
        return copy.deepcopy(models[family])

    return get


def names_of(model, kind="activation"):
    return [name for name, q in named_quantizers(model) if q.kind == kind]


def off(model):
    asymq.disable_quantizers(model)
    return model


# ---- where quantizers are ----------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_sites(family, calibrated):
    model = calibrated(family)
    names = names_of(model)
    layers = [[n for n in names if n.startswith(f"model.layers.{i}.")] for i in range(2)]
    assert [len(layer) for layer in layers] == 2 * [COUNTS[family]]
    assert set(names) == {
        *layers[0],
        *layers[1],
        "model.norm.output_quantizer",
        "lm_head.output_quantizer",
    }
    if COUNTS[family] == 18:
        expected = {f"model.layers.1.{name}_quantizer" for name in LLAMA_LAYER}
        assert set(layers[1]) == expected
    weights = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    tied = {"lm_head"} if model.lm_head.weight is model.model.embed_tokens.weight else set()
    assert set(names_of(model, "weight")) == {f"{n}.weight_quantizer" for n in weights - tied}
    norms = {n for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")}
    assert set(names_of(model, "norm_weight")) == {f"{n}.weight_quantizer" for n in norms}


def test_sites_of_the_cache(calibrated):
    """Keys after their rotation and values are of a kind of their own where it is configured."""
    config = QuantConfig(TABLE2.weight, cache=BYTE)
    model = asymq.prepare(DECODERS["llama"](), config)
    sites = {
        f"model.layers.{i}.self_attn.{s}_quantizer" for i in range(2) for s in ("key", "value")
    }
    assert set(names_of(model, "cache")) == sites and not names_of(model)
    # The last axis is that of one head.
    wide = QuantSpec(8, granularity=PerChannel())
    model = asymq.prepare(DECODERS["llama"](), QuantConfig(cache=wide))
    assert {q.range_shape for _, q in named_quantizers(model)} == {(8,)}
    for family in ("gpt2", "opt"):
        from tiny_models import FAMILIES

        model = prepared(FAMILIES[family](), QuantConfig(TABLE2.weight, BYTE, cache=BYTE))
        assert len(names_of(model, "cache")) == 4
        assert not [n for n in names_of(model) if "v_proj" in n or "query" in n]


@pytest.mark.parametrize("family", [*DECODERS, *MIXTURES])
def test_sites_of_a_recipe(family):
    """What is deployed: the inputs of attention, o_proj, the MLP and its product, and the cache."""
    model = (DECODERS | MIXTURES)[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if family in DECODERS else "ignore")
        prepared(model, QuantConfig.w4a8(group=8, cache=8))
    for kind, each, more in (("input", 4, 1), ("cache", 2, 0), ("activation", 0, 0)):
        names = names_of(model, kind)
        assert sum(".layers.1." in name for name in names) == each, names
        assert len(names) == 2 * each + more
    # The model's own attention does what has no quantizers.
    assert model.config._attn_implementation != "asymq"
    batch = tokens(1, 9)
    changed = torch.cat([batch[:, :-1], batch[:, -1:] ^ 1], 1)
    assert_bit_equal(logits(model, changed)[:, :-1], logits(model, batch)[:, :-1])
    next_token_loss(model, tokens()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


# ---- what they compute -------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*DECODERS, *MIXTURES])
def test_without_quantizers_it_is_the_float_model(family, calibrated):
    expected = logits((DECODERS | MIXTURES)[family](), tokens())
    result = logits(off(calibrated(family)), tokens())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_a_token_sees_what_it_may(family, calibrated):
    """No later one, and none outside of all windows."""
    model = calibrated(family)
    batch, position = tokens(1, 14), 3
    changed = batch.clone()
    changed[:, position] = (changed[:, position] + 7) % 97
    before, after = logits(model, batch), logits(model, changed)
    assert_bit_equal(after[:, :position], before[:, :position])
    assert not torch.equal(after[:, position], before[:, position])
    if family == "mistral":  # both layers see 4 tokens
        assert_bit_equal(after[:, position + 7 :], before[:, position + 7 :])
    assert not torch.equal(after[:, position + 5], before[:, position + 5])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_causal_mask_is_no_tensor(family, calibrated, monkeypatch):
    """With a window or without, unless something is hidden besides; the logits are a mask's."""
    model, masks = calibrated(family), []
    make = attention.sdpa_mask
    monkeypatch.setattr(attention, "sdpa_mask", lambda *a, **k: masks.append(k) or make(*a, **k))
    found = logits(model, tokens())
    assert not masks
    padding = torch.ones_like(tokens())
    padding[0, :2] = 0
    logits(model, tokens(), attention_mask=padding)
    assert masks
    monkeypatch.setattr(attention, "_is_causal", lambda *_: False)
    torch.testing.assert_close(found, logits(model, tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_what_hides_besides_the_causal_mask_is_a_tensor(window):
    plain = masking_utils.causal_mask_function
    if window is not None:
        plain = masking_utils.sliding_window_causal_mask_function(window)
    other = masking_utils.and_masks(plain, lambda *i: i[-1] % 2 == 0)
    chunks = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int))
    sizes = {"batch_size": 1, "q_length": 6, "kv_length": 6, "local_size": window}
    assert attention.attention_mask(mask_function=plain, **sizes) is None
    for function in (other, chunks, masking_utils.sliding_window_causal_mask_function(3)):
        mask = attention.attention_mask(mask_function=function, **sizes)
        assert mask.shape == (1, 1, 6, 6) and not mask.equal(torch.ones(6, 6).tril().bool())


@pytest.mark.parametrize("family", DECODERS)
def test_cached_steps_equal_the_whole(family, calibrated):
    model = calibrated(family)
    batch = tokens(2, 10)
    expected = logits(model, batch)
    # Its name changed in transformers 5.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    cache, steps = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in batch.split([4, 1, 1, 3, 1], dim=1):
            steps.append(model(part, **{name: cache}, use_cache=True).logits)
    # A code may flip.
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=5e-3, atol=5e-3)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), batch], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    places = (torch.arange(13) - 3).clamp_min(0)[None]
    result = logits(model, padded, attention_mask=mask, position_ids=places)[:, 3:]
    torch.testing.assert_close(result, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("family", [*DECODERS, *MIXTURES])
def test_gradients(family, calibrated):
    """Of every parameter; checkpointing gives the same."""
    model = calibrated(family).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        next_token_loss(model, tokens(4, 12)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        # Sums of the same terms in another order.
        assert (gradients[1][name] - gradient).abs().max() <= 1e-6 * largest, name


@pytest.mark.parametrize("family", [*DECODERS, "mixtral"])
def test_ranges_learn(family, calibrated):
    losses = train(calibrated(family), 8, 2e-2)
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.filterwarnings("ignore:asymq.prepare:UserWarning")
@pytest.mark.parametrize("family", [*DECODERS, "mixtral"])
def test_copies_and_files(family, calibrated, tmp_path):
    model = calibrated(family)  # a deepcopy
    expected = logits(model, tokens())
    fresh = asymq.prepare((DECODERS | MIXTURES)[family](), TABLE2)
    fresh.load_state_dict(model.state_dict())
    assert_bit_equal(logits(fresh, tokens()), expected)
    assert_bit_equal(logits(pickle.loads(pickle.dumps(model)), tokens()), expected)
    asymq.save(model, tmp_path)
    assert_bit_equal(logits(asymq.load(tmp_path), tokens()), expected)


def test_a_pickle_opens_in_another_process(calibrated, tmp_path):
    """Whose classes are made there."""
    model = calibrated("gemma3")
    torch.save((model, tokens(), logits(model, tokens())), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, tokens, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(tokens).logits, expected)\n"
        "assert type(model.model.norm).__name__ == 'Gemma3RMSNorm'\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_compiles_to_one_graph(family, calibrated):
    model = calibrated(family)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    result = compiled(tokens(), use_cache=False).logits
    torch.testing.assert_close(result.detach(), logits(model, tokens()), rtol=5e-3, atol=5e-3)


@pytest.mark.filterwarnings("ignore:asymq.prepare:UserWarning")
@pytest.mark.parametrize("family", [*DECODERS, *MIXTURES])
def test_convert(family, calibrated):
    """Names and classes of the float model, and what a model with quantized weights computes: also
    where an embedding that scales its values shares its weight with the head."""
    original = (DECODERS | MIXTURES)[family]()
    model = asymq.convert(calibrated(family))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert model.config.to_dict() == original.config.to_dict()
    assert model.config._attn_implementation == original.config._attn_implementation

    model = prepared((DECODERS | MIXTURES)[family](), WEIGHTS)
    expected = logits(model, tokens())
    assert not torch.equal(expected, logits(original, tokens()))
    result = logits(asymq.convert(model), tokens())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_one_thread_evaluates_while_another_trains(calibrated):
    """Each reads the norms' weights for itself."""
    model = calibrated("llama")
    expected, results = logits(model, tokens()), []

    def evaluate():
        results.extend(logits(model, tokens()) for _ in range(5))

    thread = threading.Thread(target=evaluate)
    thread.start()
    for _ in range(3):
        next_token_loss(model, tokens()).backward()
        assert isinstance(model.model.norm.weight, nn.Parameter)
    thread.join()
    for result in results:
        assert_bit_equal(result, expected)


# ---- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("functions", ["operators", "unfused"])
def test_shared_keys_equal_repeated_ones(functions, softcap, calibrated):
    """Against the composition with a copy of keys and values for every head."""
    from asymq.layers.attention import quantized_attention

    attention = calibrated("llama").model.layers[0].self_attn
    query = torch.randn(2, 4, 7, 8, requires_grad=True)
    key, value = (torch.randn(2, 2, 7, 8, requires_grad=True) for _ in range(2))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    grad = torch.randn(2, 7, 4, 8)
    inputs = (query, key, value, attention.scores_quantizer.beta)

    def quantize(site, x):
        return getattr(attention, f"{site}_quantizer")(x)

    with asymq.use_functions(functions):
        context, _ = quantized_attention(attention, query, key, value, mask, 0.3, softcap=softcap)
        actual = torch.autograd.grad(context, inputs, grad)

        k, v = (quantize(s, x).repeat_interleave(2, 1) for s, x in (("key", key), ("value", value)))
        scores = (quantize("query", query) * 0.3) @ k.mT
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        probabilities = quantize("scores", scores).masked_fill(~mask, -torch.inf).softmax(-1)
        probabilities = quantize("probabilities", probabilities).masked_fill(~mask, 0)
        expected = (probabilities @ v).transpose(1, 2)
        expected = quantize("context", expected.flatten(2)).view_as(expected)
        torch.testing.assert_close(context, expected, rtol=1e-4, atol=1e-2)
        for a, e in zip(actual, torch.autograd.grad(expected, inputs, grad), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3)


WITHOUT_SCORES = QuantConfig(
    WEIGHTS.weight, BYTE, skip=("*.scores_quantizer", "*.probabilities_quantizer")
)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_the_model_s_own_attention_goes_on(family):
    """Where neither scores nor probabilities are quantized, with whatever implementation."""
    results = []
    for implementation in ("sdpa", "eager"):
        model = DECODERS[family]()
        model.set_attn_implementation(implementation)
        expected = logits(model, tokens())
        prepared(model, WITHOUT_SCORES)
        assert model.config._attn_implementation == implementation
        results.append(logits(model, tokens()))
        assert_bit_equal(logits(off(model), tokens()), expected)
    torch.testing.assert_close(*results, rtol=5e-3, atol=5e-3)
    asymq.enable_quantizers(model)
    model.set_attn_implementation("sdpa")
    # Another implementation may be chosen at any time.
    torch.testing.assert_close(logits(model, tokens()), results[0], rtol=5e-3, atol=5e-3)


def test_sinks_are_refused():
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
    sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"scores_quantizer: this attention has sinks.*leave both"):
        asymq.prepare(model, TABLE2)
    assert model.state_dict().keys() == before
    with pytest.warns(UserWarning, match="left alone"):
        prepared(model, WITHOUT_SCORES)
    assert logits(model, tokens()).isfinite().all()


# ---- mixtures of experts -----------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_experts(family):
    """Each weight with ranges of its own for every expert; no router, and what it sees is float."""
    model = MIXTURES[family]()
    width = model.config.moe_intermediate_size if family == "qwen3-moe" else 48
    config = QuantConfig(QuantSpec(8, symmetric=True, granularity=PerChannel()), input=BYTE)
    seen = {}

    def record(name):
        return lambda module, args: seen.setdefault(name, args[0].clone())

    with pytest.warns(UserWarning, match="Experts.*SparseMoeBlock.*left alone: 2 .*TopKRouter"):
        asymq.prepare(model, config)
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        assert experts.gate_up_proj_quantizer.range_shape == (4, 2 * width, 1)
        assert experts.down_proj_quantizer.range_shape == (4, 32, 1)
        assert not any(named_quantizers(layer.mlp.gate))
        assert {n for n in names_of(model, "input") if f"layers.{i}.mlp" in n} == {
            f"model.layers.{i}.mlp.experts.{site}_quantizer" for site in ("input", "product")
        }
    asymq.calibrate(model, [tokens()])
    before = experts.gate_up_proj_quantizer.max.clone()
    with torch.no_grad():
        experts.gate_up_proj[1] *= 2
    asymq.calibrate(model, [tokens()])
    before[1] *= 2  # of the one expert
    assert_bit_equal(experts.gate_up_proj_quantizer.max, before)
    layer.mlp.gate.register_forward_pre_hook(record("router"))
    layer.mlp.register_forward_pre_hook(record("block"))
    logits(model, tokens())
    assert_bit_equal(seen["router"].view_as(seen["block"]), seen["block"])


def test_a_router_that_is_a_layer():
    """It looks like any other one, and its name alone says what it is."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    sizes |= {"shared_expert_intermediate_size": 16, "num_key_value_heads": 2}
    model = _small("Qwen2MoeForCausalLM", **sizes)
    with pytest.warns(UserWarning, match="left alone: 2 Linear, 2 Qwen2MoeTopKRouter"):
        prepared(model, TABLE2)
    names = [name for name, _ in named_quantizers(model)]
    assert not [n for n in names if ".gate." in n or ".shared_expert_gate." in n]
    assert "model.layers.0.mlp.shared_expert.product_quantizer" in names


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_run_alike(family):
    """Whatever transformers runs them with, their second input included."""
    config = QuantConfig(WEIGHTS.weight, input=BYTE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepared(MIXTURES[family](), config)
    results = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        results.append(logits(model, tokens()))
    torch.testing.assert_close(results[1], results[0], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(results[2], results[0], rtol=5e-3, atol=5e-3)
    for name, quantizer in named_quantizers(model):
        if name.endswith("product_quantizer"):
            quantizer.state = "off"
    assert not torch.equal(logits(model, tokens()), results[2])


# ---- other models ------------------------------------------------------------------------------


def _small(model, **options):
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 97}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0}
    config = getattr(transformers, model.partition("For")[0] + "Config")
    return getattr(transformers, model)(config(**sizes | options)).eval()


OTHERS = {
    "BertForMaskedLM": ("bert.encoder.layer.1.attention.self", "BertAttention: self output"),
    "GPTNeoXForCausalLM": ("gpt_neox.layers.1.attention", "GPTNeoXLayer: input_layernorm"),
    "ViTForImageClassification": (None, "ViTLayer: layernorm_before attention dropout +"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_attention_and_activations_of_any_model(name):
    model = _small(name, **({"image_size": 16, "patch_size": 8} if "ViT" in name else {}))
    x = torch.randn(2, 3, 16, 16) if "ViT" in name else tokens()
    expected = logits(model, x)
    attention, steps = OTHERS[name]
    with pytest.warns(UserWarning, match="what happens between its layers is not quantized") as w:
        asymq.prepare(model, TABLE2)
    assert steps in str(w[0].message)
    torch.testing.assert_close(logits(off(model), x), expected, rtol=1e-5, atol=1e-5)
    asymq.calibrate(model, [x])
    names = set(names_of(model))
    sites = ("query", "key", "value", "scores", "probabilities", "context")
    attentions = [n.removesuffix(".scores_quantizer") for n in names if "scores" in n]
    assert len(attentions) == 2 and attention in (None, *attentions)
    assert {f"{a}.{site}_quantizer" for a in attentions for site in sites} <= names
    assert sum("act" in n for n in names) >= 2  # of both layers' activation functions
    if "ViT" in name:
        patches = "vit.embeddings.patch_embeddings.projection"
        assert f"{patches}.weight_quantizer" in names_of(model, "weight")
        assert f"{patches}.output_quantizer" in names
        assert model.get_submodule(patches).weight_quantizer.range_shape == (32, 1, 1, 1)
    model(x).logits.sum().backward()
    for group in asymq.range_parameters(model):
        assert all(p.grad is not None for p in group["params"])
    implementation = model.config._attn_implementation
    asymq.convert(model)
    assert implementation == "asymq" != model.config._attn_implementation


def test_cache_and_inputs_of_an_encoder():
    model = _small("BertForMaskedLM")
    with pytest.warns(UserWarning, match="not quantized"):
        asymq.prepare(model, QuantConfig(WEIGHTS.weight, input=BYTE, cache=BYTE))
    assert len(names_of(model, "cache")) == 4
    assert len([n for n in names_of(model, "input") if ".layer.0." in n]) == 4
    assert model.config._attn_implementation == "sdpa"


# ---- steps -------------------------------------------------------------------------------------


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = self.attn = self.mlp = nn.Identity()


class Known(_Layer):
    def forward(self, x, mask=None, **kwargs):
        y, _ = self.attn(self.norm(x), mask=mask, **kwargs)
        x = y + x
        return x + self.mlp(self.norm(x))


class OtherResidual(_Layer):
    """The same calls in the same order as above."""

    def forward(self, x, mask=None, **kwargs):
        x = self.norm(x)
        y, _ = self.attn(x, mask=mask, **kwargs)
        x = y + x
        return x + self.mlp(self.norm(x))


class OtherArguments(_Layer):
    def forward(self, x, mask=None, **kwargs):
        y, _ = self.attn(self.norm(x), mask=None, **kwargs)
        x = y + x
        return x + self.mlp(self.norm(x))


class Branches(_Layer):
    def forward(self, x, mask=None, **kwargs):
        y, _ = self.attn(self.norm(x), mask=mask, **kwargs)
        x = y + x
        if self.training:
            x = x + self.mlp(self.norm(x))
        return x + self.mlp(self.norm(x))


class Functional(transformers.models.llama.modeling_llama.LlamaMLP):
    """Whose activation is a function."""

    def __init__(self, config):
        super().__init__(config)
        del self.act_fn
        self.act_fn = nn.functional.silu


def test_a_function_among_the_modules():
    model = DECODERS["llama"]()
    for layer in model.model.layers:
        mlp = Functional(model.config)
        mlp.load_state_dict(layer.mlp.state_dict())
        layer.mlp = mlp.eval()
    expected = logits(model, tokens())
    with pytest.warns(UserWarning, match=r"\(Functional: gate_proj act_fn up_proj \* down_proj\)"):
        prepared(model)
    assert len(names_of(model)) == 2 * 16 + 2
    torch.testing.assert_close(logits(off(model), tokens()), expected, rtol=1e-5, atol=1e-5)


class Gated(nn.Module):
    def forward(self, x):
        return self.down(self.up(x) * self.act(self.gate(x)))


class NotGated(nn.Module):
    def forward(self, x):
        return self.down(self.up(x) * self.act(self.gate(self.up(x))))


def test_steps_say_what_flows_where():
    assert layer_of(Known).steps == (
        "norm", "attn", "attention_sum_quantizer", "norm", "mlp", "mlp_sum_quantizer",
    )  # fmt: skip
    assert read(Known).steps == read(OtherResidual).steps == read(OtherArguments).steps
    for other in (OtherResidual, OtherArguments, Branches, Gated, nn.Linear, nn.Identity):
        assert layer_of(other) is None
    assert gated_mlp_of(Gated) == ("gate", "act", "up", "down")
    assert gated_mlp_of(NotGated) is None and gated_mlp_of(Known) is None


@pytest.mark.parametrize(
    "granularity, ranges",
    [
        (asymq.PerTensor(), (4, 1, 1)),
        (PerChannel(), (4, 96, 1)),
        (PerGroup(8), (4, 96, 4)),
    ],
)
def test_ranges_of_experts(granularity, ranges):
    spec = QuantSpec(4, symmetric=True, granularity=granularity)
    with pytest.warns(UserWarning, match="left alone"):
        model = prepared(MIXTURES["mixtral"](), QuantConfig(spec))
    experts = model.model.layers[1].mlp.experts
    quantizer = experts.gate_up_proj_quantizer
    assert quantizer.range_shape == ranges
    # Alone, an expert's weight gets the same values.
    of_one = asymq.QuantLinear(32, 96, bias=False, weight=spec)
    with torch.no_grad():
        of_one.weight.copy_(experts.gate_up_proj[2])
        asymq.calibrate(nn.Sequential(of_one), [torch.randn(1, 32)])
        expected = of_one.quantized_weight()
        assert_bit_equal(quantizer(experts.gate_up_proj)[2], expected)
