"""Models under recipes: inputs with a range of each token, embeddings and heads of their own."""

import copy

import pytest
import torch
from support.tiny_models import _build, gpt2, logits, next_token_loss, opt, prepared, tokens, train
from torch import nn

import asymq
from asymq import PerChannel, PerGroup, PerTensor, PerToken, QuantConfig, QuantSpec
from asymq.quantizers import functions
from asymq.quantizers.sharing import _thread

transformers = pytest.importorskip("transformers", minversion="5.4")
pytestmark = pytest.mark.filterwarnings("ignore:asymq.prepare. .* is not a model whose every")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = QuantSpec(granularity=PerToken())
ROWS = QuantSpec(8, symmetric=True, granularity=PerChannel())


def llama(**options) -> nn.Module:
    return _build(transformers.LlamaForCausalLM, transformers.LlamaConfig, SIZES | options)


def of_kind(model, kind):
    return [name for name, q in asymq.named_quantizers(model) if q.kind == kind]


@pytest.fixture(scope="module")
def w4a8_model():
    return prepared(llama(), QuantConfig.w4a8(group=16))


@pytest.fixture
def w4a8(w4a8_model):
    return copy.deepcopy(w4a8_model)


def test_inputs_are_named_after_the_first_layer_that_is_fed_them(w4a8):
    layer = "model.layers.{}."
    sites = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    expected = [f"{layer.format(i)}{site}.input_quantizer" for i in (0, 1) for site in sites]
    assert of_kind(w4a8, "input") == [*expected, "lm_head.input_quantizer"]
    attention, mlp = w4a8.model.layers[0].self_attn, w4a8.model.layers[0].mlp
    assert attention.k_proj.input_quantizer is attention.q_proj.input_quantizer
    assert attention.v_proj.input_quantizer is attention.q_proj.input_quantizer
    assert mlp.up_proj.input_quantizer is mlp.gate_proj.input_quantizer
    assert "q_proj.input_quantizer: one input with" in asymq.summary(w4a8)


class Counting:
    """The operators, whose calls are counted by name."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            return getattr(asymq.ops, name)(*args, **kwargs)

        return call


def test_an_input_is_quantized_once_a_forward(w4a8):
    with functions.use_namespace(Counting()) as counting:
        logits(w4a8, tokens())
    assert counting.calls.count("fake_quantize_dynamic_beta_gamma") == 2 * 4 + 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharing_an_input_changes_no_gradient(w4a8, checkpointing):
    w4a8.train()
    if checkpointing:
        w4a8.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for shared in (True, False):
        for _, quantizer in asymq.named_quantizers(w4a8):
            quantizer.users = quantizer.users if shared else 1
        w4a8.zero_grad()
        next_token_loss(w4a8, tokens()).backward()
        gradients.append({n: p.grad.clone() for n, p in w4a8.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)
        assert gradient.any(), name


def test_a_shared_input_keeps_nothing_after_its_last_user(w4a8):
    from asymq.quantizers import sharing
    from asymq.quantizers.sharing import results

    x = torch.randn(3, 32)
    attention = w4a8.model.layers[0].self_attn
    with torch.no_grad(), sharing():
        attention.q_proj(x)
        attention.k_proj(x)
        assert any(isinstance(key, tuple) for key in results())
        attention.v_proj(x)
        assert not any(isinstance(key, tuple) for key in results())
        # Another tensor in the same place is another one.
        a, b = attention.q_proj(x), attention.q_proj(2 * x)
        assert not torch.equal(a, b)


GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
GENERATE |= {"output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("tied", [False, True])
def test_generate_quantizes_a_weight_once(tied):
    model = prepared(llama(tie_word_embeddings=tied), QuantConfig.w4a8(group=16)).eval()
    weights = [q for _, q in asymq.named_quantizers(model) if q.kind == "weight"]
    with functions.use_namespace(Counting()) as counting:
        result = model.generate(tokens(2, 4), **GENERATE)
    assert counting.calls.count("fake_quantize_symmetric_gamma") == len(weights)
    expected = logits(model, result.sequences)[:, 3:-1]
    torch.testing.assert_close(torch.stack(result.logits, 1), expected, rtol=5e-3, atol=5e-3)
    assert getattr(_thread, "unchanged", None) is None


@pytest.mark.parametrize("what", ["weight", "weight_quantizer.gamma"])
def test_generate_sees_what_changes_meanwhile(w4a8, what):
    w4a8.eval()
    changed = w4a8.lm_head.get_parameter(what)

    def halve(ids, scores):
        if ids.shape[1] == 6:
            with torch.no_grad():
                changed.mul_(0.5)
        return scores

    result = w4a8.generate(tokens(2, 4), logits_processor=[halve], **GENERATE)
    expected = logits(w4a8, result.sequences)[:, 6:-1]
    torch.testing.assert_close(torch.stack(result.logits[3:], 1), expected, rtol=5e-3, atol=5e-3)


def test_a_graph_has_every_weight_while_a_model_generates(w4a8):
    def learn(ids, scores):
        with torch.enable_grad():
            next_token_loss(w4a8, tokens()).backward()
        return scores

    w4a8.generate(tokens(2, 4), logits_processor=[learn], **GENERATE)
    for name, quantizer in asymq.named_quantizers(w4a8):
        assert all(p.grad is not None for p in quantizer.parameters()), name


def test_no_token_sees_another(w4a8):
    batch = tokens()
    whole = logits(w4a8, batch)
    changed = batch.clone()
    changed[:, 8:] = 5
    torch.testing.assert_close(logits(w4a8, changed)[:, :8], whole[:, :8])
    torch.testing.assert_close(logits(w4a8, batch.flip(0)), whole.flip(0))


def test_ranges_lower_the_loss_and_every_one_learns(w4a8):
    losses = train(w4a8, 30, 1e-2)
    assert losses[-1] < losses[0]
    for name, quantizer in asymq.named_quantizers(w4a8):
        for factor in quantizer.learned:
            assert (getattr(quantizer, factor) != getattr(quantizer, f"initial_{factor}")).any(), (
                name
            )
    # A second calibration starts afresh.
    asymq.calibrate(w4a8, [tokens()])
    assert all((q.gamma == 1).all() for _, q in asymq.named_quantizers(w4a8))


def test_a_folder_and_a_state_bring_it_back(w4a8, tmp_path):
    train(w4a8, 2, 1e-2)
    expected = logits(w4a8, tokens())
    asymq.save(w4a8, tmp_path)
    loaded = asymq.load(tmp_path)
    assert torch.equal(logits(loaded, tokens()), expected)
    assert of_kind(loaded, "input") == of_kind(w4a8, "input")
    fresh = asymq.prepare(llama(), QuantConfig.w4a8(group=16))
    fresh.load_state_dict(w4a8.state_dict())
    assert torch.equal(logits(fresh, tokens()), expected)


RECIPES = {
    "w4a16": QuantConfig.w4a16(group=16),
    "w4a8": QuantConfig.w4a8(group=16),
    "w8a8": QuantConfig.w8a8(),
    "w4a4": QuantConfig.w4a4(group=16),
    "w4a4 rows": QuantConfig.w4a4(),
    "npu": QuantConfig.npu(),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tied", [False, True])
def test_recipes_run_and_learn(recipe, tied):
    model = llama(tie_word_embeddings=tied)
    exact = logits(model, tokens())
    prepared(model, RECIPES[recipe])
    quantized = isinstance(model.lm_head, asymq.QuantLinear)
    assert quantized == (recipe in ("w4a8", "npu"))
    assert not torch.equal(logits(model, tokens()), exact)
    next_token_loss(model, tokens()).backward()
    for name, quantizer in asymq.named_quantizers(model):
        # A factor of an end that is 0, such as that of probabilities, moves nothing.
        assert any(p.grad is not None and p.grad.any() for p in quantizer.parameters()), name
    asymq.disable_quantizers(model)
    torch.testing.assert_close(logits(model, tokens()), exact, rtol=1e-5, atol=1e-5)


def test_tied_weights_that_shall_be_two_things():
    config = QuantConfig(ROWS, embedding=ROWS.replace(bits=4))
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight \(embedding: .*lm_head.weight \(head"
    ):
        asymq.prepare(llama(tie_word_embeddings=True), config)
    model = asymq.prepare(llama(), config)
    assert model.model.embed_tokens.weight_quantizer.spec.bits == 4
    assert model.lm_head.weight_quantizer.spec.bits == 8


def test_a_range_that_does_not_learn():
    config = QuantConfig(ROWS.replace(learn=False), input=TOKENS)
    model = prepared(llama(), config)
    (group,) = asymq.range_parameters(model)
    assert len(group["params"]) == 2 * len(of_kind(model, "input"))
    next_token_loss(model, tokens()).backward()
    weights = [q for _, q in asymq.named_quantizers(model) if q.kind == "weight"]
    assert all(q.gamma.grad is None and q.calibrated for q in weights)
    ranges = {id(p) for _, q in asymq.named_quantizers(model) for p in q.parameters()}
    assert not any(id(p) in ranges for p in asymq.weight_parameters(model))
    with pytest.raises(ValueError, match="no quantizers with learned ranges"):
        asymq.range_parameters(prepared(llama(), QuantConfig(ROWS.replace(learn=False))))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(4)])
@pytest.mark.parametrize("full_range", [False, True])
def test_live_weights_are_what_their_extrema_make_them(symmetric, granularity, full_range):
    if full_range and not symmetric:
        return
    spec = QuantSpec(4, symmetric, granularity, full_range=full_range)
    live = asymq.QuantLinear(8, 6, weight=spec.replace(dynamic=True))
    stored = asymq.QuantLinear(8, 6, weight=spec)
    stored.weight = live.weight
    asymq.calibrate(nn.Sequential(stored), [torch.randn(3, 8)], force_zero=False)
    factor = torch.full_like(stored.weight_quantizer.gamma, 0.7)
    results = []
    for layer in (live, stored):
        layer.weight_quantizer.gamma.data.copy_(factor)
        layer.zero_grad()
        weight = layer.quantized_weight()
        weight.backward(torch.arange(48.0).view(6, 8))
        results.append((weight, layer.weight.grad, layer.weight_quantizer.gamma.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


CANNOT_BE = {
    "groups": (
        QuantConfig.w4a4(group=12),
        r"q_proj.weight_quantizer: groups of 12 do not divide an axis of 32|groups of 12",
    ),
    "token groups": (
        QuantConfig(input=QuantSpec(granularity=PerToken(24))),
        "q_proj.input_quantizer: groups of 24 do not divide an axis of 32",
    ),
    "later tokens": (QuantConfig(input=QuantSpec(dynamic=True)), r"q_proj.*later tokens; PerToken"),
    "a weight by name": (
        QuantConfig(input=TOKENS, overrides={"*up_proj.weight_quantizer": TOKENS}),
        r"up_proj.*a weight has no tokens",
    ),
    "an alias": (
        QuantConfig(input=TOKENS, skip="*k_proj.input_quantizer"),
        "k_proj.input_quantizer is .*q_proj.input_quantizer, since the input is one tensor",
    ),
}


@pytest.mark.parametrize("case", CANNOT_BE)
def test_what_prepare_refuses(case):
    config, message = CANNOT_BE[case]
    model = llama()
    with pytest.raises(ValueError, match=message):
        asymq.prepare(model, config)
    assert not list(asymq.named_quantizers(model))


@pytest.mark.parametrize("family", [gpt2, opt])
def test_scores_have_no_tokens(family):
    with pytest.raises(ValueError, match=r"scores_quantizer is PerToken: .* use PerTensor\(\)"):
        asymq.prepare(family(), QuantConfig(activation=TOKENS), allow_lookahead=True)
    spared = QuantConfig(activation=TOKENS, overrides={"*scores_quantizer": QuantSpec()})
    model = prepared(family(), spared)
    whole, changed = tokens(), tokens()
    changed[:, 8:] = 5
    torch.testing.assert_close(logits(model, changed)[:, :8], logits(model, whole)[:, :8])


def test_a_cache_without_attention():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"cache is given, but Sequential has no attention"):
        asymq.prepare(model, QuantConfig(ROWS, cache=QuantSpec()))


def test_queries_from_elsewhere_have_a_range_of_their_own():
    config = transformers.T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    model = transformers.T5ForConditionalGeneration(config)
    asymq.prepare(model, QuantConfig(ROWS, input=QuantSpec()))
    cross = model.decoder.block[0].layer[1].EncDecAttention
    assert cross.q.input_quantizer is not cross.k.input_quantizer
    assert cross.v.input_quantizer is cross.k.input_quantizer
    own = model.decoder.block[0].layer[0].SelfAttention
    assert own.q.input_quantizer is own.v.input_quantizer
    gated = model.decoder.block[0].layer[2].DenseReluDense
    assert gated.wi_1.input_quantizer is gated.wi_0.input_quantizer


def test_layers_below_adapters_share_their_input():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = prepared(adapted, QuantConfig.w4a8(group=16))
    attention = model.base_model.model.model.layers[0].self_attn
    shared = attention.q_proj.base_layer.input_quantizer
    assert shared.users == 3
    assert attention.k_proj.input_quantizer is shared
    assert attention.v_proj.base_layer.input_quantizer is shared
    assert not any("lora_" in name for name, _ in asymq.named_quantizers(model))


def test_overrides_select_by_kind():
    wide = QuantSpec(16)
    config = QuantConfig(
        ROWS, input=TOKENS, overrides={"input:*down_proj*": wide}, skip="input:*0*"
    )
    model = asymq.prepare(llama(), config)
    specs = {name: q.spec for name, q in asymq.named_quantizers(model) if q.kind == "input"}
    assert specs["model.layers.1.mlp.down_proj.input_quantizer"] == wide
    assert specs["model.layers.1.mlp.gate_proj.input_quantizer"] == TOKENS
    assert not any("layers.0" in name for name in specs)
    assert PerTensor() == wide.granularity
