"""GPT-2 and OPT with quantizers: where they are, and what the model computes with them."""

import copy
from inspect import signature

import pytest
import torch
from compare import assert_bit_equal, assert_sums
from operator_calls import OperatorCalls
from recorder import Recorder
from tiny_models import (
    FAMILIES,
    SETTINGS,
    VOCABULARY,
    gpt2,
    logits,
    next_token_loss,
    opt,
    prepared,
    tokens,
    transformers,
)
from transformers.loss.loss_utils import ForCausalLMLoss

import asymq
from asymq import QuantConfig, QuantSpec
from asymq.layers.loss import unquantized
from asymq.quantizers.functions import use_namespace

TABLE2 = QuantConfig.table2("beta_gamma")

# ---- where quantizers are ----------------------------------------------------------------------

GPT2_BLOCK = """
attn.c_attn.output_quantizer
attn.c_attn.weight_quantizer
attn.c_proj.output_quantizer
attn.c_proj.weight_quantizer
attn.context_quantizer
attn.probabilities_quantizer
attn.scores_quantizer
attention_sum_quantizer
ln_1.output_quantizer
ln_1.weight_quantizer
ln_2.output_quantizer
ln_2.weight_quantizer
mlp.act.output_quantizer
mlp.c_fc.output_quantizer
mlp.c_fc.weight_quantizer
mlp.c_proj.output_quantizer
mlp.c_proj.weight_quantizer
mlp_sum_quantizer
""".split()

OPT_LAYER = """
activation_fn.output_quantizer
attention_sum_quantizer
fc1.weight_quantizer
fc2.output_quantizer
fc2.weight_quantizer
final_layer_norm.output_quantizer
final_layer_norm.weight_quantizer
mlp_sum_quantizer
self_attn.context_quantizer
self_attn.k_proj.output_quantizer
self_attn.k_proj.weight_quantizer
self_attn.out_proj.output_quantizer
self_attn.out_proj.weight_quantizer
self_attn.probabilities_quantizer
self_attn.q_proj.output_quantizer
self_attn.q_proj.weight_quantizer
self_attn.scores_quantizer
self_attn.v_proj.output_quantizer
self_attn.v_proj.weight_quantizer
self_attn_layer_norm.output_quantizer
self_attn_layer_norm.weight_quantizer
""".split()

NAMES = {
    "gpt2": [
        *(f"transformer.h.{i}.{name}" for i in range(2) for name in GPT2_BLOCK),
        "transformer.wte.weight_quantizer",
        "transformer.wpe.weight_quantizer",
        "transformer.h.0.input_quantizer",
        "transformer.ln_f.weight_quantizer",
        "transformer.ln_f.output_quantizer",
        "lm_head.output_quantizer",
    ],
    "opt": [
        *(f"model.decoder.layers.{i}.{name}" for i in range(2) for name in OPT_LAYER),
        "model.decoder.embed_tokens.weight_quantizer",
        "model.decoder.embed_positions.weight_quantizer",
        "model.decoder.layers.0.input_quantizer",
        "model.decoder.final_layer_norm.weight_quantizer",
        "model.decoder.final_layer_norm.output_quantizer",
        "lm_head.output_quantizer",
    ],
}


def kinds(model):
    found = [quantizer.kind for _, quantizer in asymq.named_quantizers(model)]
    return {kind: found.count(kind) for kind in ("activation", "norm_weight", "weight")}


@pytest.mark.parametrize("family", FAMILIES)
def test_names(family):
    model = asymq.prepare(FAMILIES[family](), TABLE2)
    names = [name for name, _ in asymq.named_quantizers(model)]
    assert sorted(names) == sorted(NAMES[family])
    for name, quantizer in asymq.named_quantizers(model):
        assert quantizer.name == name
        norm = "ln_" in name or "layer_norm" in name
        weight = "norm_weight" if norm else "weight"
        assert quantizer.kind == (weight if "weight_quantizer" in name else "activation"), name


@pytest.mark.parametrize(
    "model, expected",
    [
        (lambda: gpt2(n_layer=12, n_embd=8), (147, 25, 50)),
        (lambda: opt(num_hidden_layers=8), (107, 17, 50)),
    ],
    ids=["gpt2-small", "opt-8-layers"],
)
def test_counts_of_the_paper(model, expected):
    model = asymq.prepare(model(), TABLE2)
    assert tuple(kinds(model).values()) == expected


def test_layers_that_not_every_model_has():
    untied = asymq.prepare(gpt2(tie_word_embeddings=False), TABLE2)
    names = dict(asymq.named_quantizers(untied))
    assert set(names) == {*NAMES["gpt2"], "lm_head.weight_quantizer"}
    assert names["lm_head.weight_quantizer"].gamma.shape == (VOCABULARY, 1)

    # Without a final norm, with projections, and an activation other than ReLU, whose input counts.
    post = opt(do_layer_norm_before=False, word_embed_proj_dim=16, activation_function="gelu")
    names = {name for name, _ in asymq.named_quantizers(asymq.prepare(post, TABLE2))}
    decoder = "model.decoder"
    expected = {name for name in NAMES["opt"] if f"{decoder}.final_layer_norm" not in name}
    expected |= {f"{decoder}.layers.{i}.fc1.output_quantizer" for i in range(2)}
    for projection in ("project_in", "project_out"):
        for part in ("weight", "output"):
            expected.add(f"{decoder}.{projection}.{part}_quantizer")
    assert names == expected


def test_overrides_and_skip():
    wide = QuantSpec(bits=16, parameterization="min_max")
    config = QuantConfig(
        TABLE2.weight,
        TABLE2.activation,
        None,
        overrides={"*.scores_quantizer": wide, "*.h.1.attn.scores_quantizer": None},
        skip=("lm_head.*", "*.mlp.act.*", "transformer.wpe.*", "*.input_quantizer"),
    )
    model = prepared(gpt2(), config)
    quantizers = dict(asymq.named_quantizers(model))
    gone = [n for n in NAMES["gpt2"] if ".ln_" in n and "weight" in n]
    gone += ["lm_head.output_quantizer", "transformer.wpe.weight_quantizer"]
    gone += ["transformer.h.1.attn.scores_quantizer", "transformer.h.0.input_quantizer"]
    gone += [f"transformer.h.{i}.mlp.act.output_quantizer" for i in range(2)]
    assert set(quantizers) == set(NAMES["gpt2"]) - set(gone)
    assert quantizers["transformer.h.0.attn.scores_quantizer"].spec == wide
    model(tokens())


# ---- quantizers off: the float model -----------------------------------------------------------

VARIANTS = {
    "gpt2": gpt2,
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False),
    "gpt2-scaled-by-layer": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt2-unscaled-relu": lambda: gpt2(scale_attn_weights=False, activation_function="relu"),
    "opt": opt,
    "opt-post-norm": lambda: opt(do_layer_norm_before=False, word_embed_proj_dim=16),
    "opt-projected": lambda: opt(word_embed_proj_dim=16, activation_function="gelu"),
    "opt-without-bias": lambda: opt(enable_bias=False, layer_norm_elementwise_affine=False),
}


def padded(side, lengths=(12, 7, 3)):
    """Arguments of a batch of rows of these lengths, and where each row's tokens are."""
    width = max(lengths)
    rows = tokens(len(lengths), width)
    inputs, mask = torch.ones_like(rows), torch.zeros_like(rows)
    positions = torch.zeros_like(rows)
    places = []
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        inputs[row, place], mask[row, place] = rows[row, :length], 1
        positions[row, place] = torch.arange(length)
        places.append(place)
    arguments = {"input_ids": inputs, "attention_mask": mask, "position_ids": positions}
    return arguments, places


def on(device, arguments):
    return {name: value.to(device) for name, value in arguments.items()}


def assert_close(actual, expected, tolerance=1e-6):
    assert ((actual - expected).abs().max() <= tolerance * expected.abs().max()).all()


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_quantizers_off_is_the_float_model(variant, padding, device):
    model = VARIANTS[variant]().to(device)
    expected = copy.deepcopy(model)
    expected.set_attn_implementation("eager")
    arguments = {"input_ids": tokens()} if padding is None else padded(padding)[0]
    arguments = on(device, arguments)
    before = list(model.state_dict())
    assert asymq.prepare(model, TABLE2) is model
    asymq.disable_quantizers(model)
    assert [key for key in model.state_dict() if "quantizer" not in key] == before
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        actual, expected = (m(**arguments, **options) for m in (model, expected))
    assert_close(actual.logits, expected.logits)
    for field in ("hidden_states", "attentions"):
        for a, b in zip(actual[field], expected[field], strict=True):
            assert_close(a, b, 2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_the_float_model_s(family, device):
    model = FAMILIES[family]().to(device)
    expected = copy.deepcopy(model)
    expected.set_attn_implementation("eager")
    asymq.prepare(model, TABLE2)
    asymq.disable_quantizers(model)
    results = []
    for m in (model, expected):
        torch.manual_seed(3)
        results.append(logits(m.train(), tokens().to(device)))
    assert_close(*results)
    assert not torch.equal(results[1], logits(expected.eval(), tokens().to(device)))


# ---- quantizers on: the reference --------------------------------------------------------------


@pytest.mark.parametrize("weights", ["frozen", "joint"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_reference(family, setting, weights, device):
    model = prepared(FAMILIES[family]().to(device), setting)
    batch = tokens().to(device)
    if weights == "frozen":
        asymq.freeze_weights(model)
    with torch.no_grad():
        for group in asymq.range_parameters(model):
            for parameter in group["params"]:
                parameter.mul_(0.9)  # so that values lie outside, too

    def run():
        model.zero_grad()
        output = model(batch, labels=batch)
        output.loss.backward()
        return output.logits, {name: p.grad for name, p in model.named_parameters()}

    with asymq.use_functions("unfused"):  # as the reference is
        result, actual = run()
    with use_namespace(Recorder()) as recorder:
        expected_result, expected = run()
        ranges = {n: p for n, p in model.named_parameters() if "quantizer" in n}
        terms = {name: recorder.terms(p) for name, p in ranges.items()}
    assert_bit_equal(result, expected_result)
    for name, value in expected.items():
        if name in ranges:
            assert_sums(actual[name], value, terms[name])
            assert value.any() or not terms[name].any(), name
        elif weights == "joint":
            assert_close(actual[name], value)
        else:
            assert value is None and actual[name] is None, name
    # One call of each: the tied weight of wte and lm_head, too.
    assert len(recorder.calls) == len(list(asymq.named_quantizers(model)))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_composed(family, padding, device):
    model = prepared(FAMILIES[family]().to(device), "min_max")
    ids = tokens().to(device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)

    def step():
        model.zero_grad()
        with OperatorCalls() as recorder:
            out = model(input_ids=ids, attention_mask=mask if padding else None, labels=labels)
            out.loss.backward()
        names = [function.__name__.removesuffix(".default") for function, _ in recorder.calls]
        gradients = {n: p.grad for n, p in model.named_parameters()}
        return out.loss.detach(), out.logits.detach(), gradients, names

    loss, result, gradients, used = step()
    counts = {"softmax": (2, 2), "gelu": 2 * (2 * (family == "gpt2"),), "cross_entropy": (1, 1)}
    for name, (forwards, backwards) in counts.items():
        assert used.count(f"_quantized_{name}") == forwards
        assert used.count(f"_quantized_{name}_backward") == backwards
    with asymq.use_functions("unfused"):
        expected_loss, expected_result, expected, used = step()
    assert set(used) == {"_fake_quantize", "_fake_quantize_backward"}
    assert_close(loss, expected_loss)
    seen = mask.bool() if padding else slice(None)
    assert_close(result[seen], expected_result[seen], 1e-4)
    # Some gradients are zero but for rounding, such as the keys' bias: softmax ignores it.
    noise = 1e-6 * max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        bound = 1e-3 * gradient.abs().max() + noise
        assert ((gradients[name] - gradient).abs() <= bound).all(), name


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 7}, {"shift_labels": True}])
def test_the_loss_is_transformers_s(options, device):
    """Of the logits that the model returns, whatever the loss is asked for."""
    model = prepared(gpt2().to(device))
    ids = tokens().to(device)
    labels = ids.clone()
    labels[0, 4:] = -100
    if "shift_labels" in options:
        options = {"shift_labels": labels}
    out = model(ids, labels=labels, **options)
    assert unquantized(out.logits) is not None
    expected = ForCausalLMLoss(out.logits.detach(), labels, VOCABULARY, **options)
    assert_close(out.loss, expected)
    # What was done to the logits counts, too.
    assert_close(
        model.loss_function(2 * out.logits, labels, VOCABULARY, **options),
        ForCausalLMLoss(2 * out.logits.detach(), labels, VOCABULARY, **options),
    )


def test_a_loss_of_the_user_stays(device):
    model = gpt2().to(device)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    prepared(model)
    out = model(tokens().to(device), labels=tokens().to(device))
    assert_close(out.loss, out.logits.sum())
    asymq.convert(model)
    assert_close(model.loss_function(out.logits, None, 1), out.logits.sum())


def test_logits_without_a_graph_keep_nothing(device):
    """Of evaluations whose logits are collected, nothing else may stay."""
    model = prepared(gpt2().to(device))
    assert unquantized(logits(model, tokens().to(device))) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_quantizing_changes_the_result_a_little(family, device):
    """Guards the comparisons above against quantizers that do nothing, or far too much."""
    model = FAMILIES[family]().to(device)
    batch = tokens().to(device)
    expected = logits(model, batch)
    wide = QuantSpec(bits=12, parameterization="min_max")
    asymq.prepare(model, QuantConfig(wide, wide, wide))
    asymq.calibrate(model, [batch])
    error = (logits(model, batch) - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backward_belongs_to_its_forward(family, device):
    """Whatever happens to the quantizers' states in between, as in distillation."""
    model = prepared(FAMILIES[family]().to(device))
    gradients = []
    for disable in (False, True):
        model.zero_grad()
        loss = next_token_loss(model, tokens().to(device))
        if disable:
            asymq.disable_quantizers(model)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        assert_bit_equal(actual, expected)


# ---- attention ---------------------------------------------------------------------------------


def trained_until_probabilities_are_positive(family, device):
    """A batch and a model whose training on it has moved every range, and one of the probabilities'
    lower ends above 0."""
    for seed in range(10):
        model = prepared(FAMILIES[family]().to(device), "min_max")
        batch = tokens(seed=seed).to(device)
        quantizers = dict(asymq.named_quantizers(model))
        before = {n: p.clone() for n, p in model.named_parameters() if "quantizer" in n}
        optimizer = torch.optim.Adam(asymq.range_parameters(model, 1e-1))
        for _ in range(12):
            optimizer.zero_grad()
            next_token_loss(model, batch).backward()
            optimizer.step()
            low = max(q.bounds()[0] for n, q in quantizers.items() if "probabilities" in n)
            if low > 0.02:
                assert all(
                    (p != before[n]).any() for n, p in model.named_parameters() if n in before
                )
                return batch, model
    pytest.fail("no lower end of the probabilities' ranges turned positive")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_sees_a_later_one(family, device):
    """Not even where the lower end of the probabilities' range has turned positive."""
    batch, model = trained_until_probabilities_are_positive(family, device)
    for arguments in ({"input_ids": batch}, on(device, padded("left")[0])):
        expected, differ = logits(model, **arguments), 0
        for position in range(1, arguments["input_ids"].shape[1]):
            changed = arguments["input_ids"].clone()
            changed[:, position] = (changed[:, position] + 7) % VOCABULARY
            actual = logits(model, **{**arguments, "input_ids": changed})
            assert_bit_equal(actual[:, :position], expected[:, :position])
            differ += not torch.equal(actual[:, position:], expected[:, position:])
        assert differ > 3


def test_masked_probabilities_are_zero():
    """After their quantizer, with scores and probabilities of any range."""
    model = prepared(gpt2(), "min_max")
    for name, quantizer in asymq.named_quantizers(model):
        if name.endswith("probabilities_quantizer"):
            quantizer.set_range(torch.tensor([0.25]), torch.tensor([1.0]))
    arguments, places = padded("left")
    with torch.no_grad():
        attentions = model(**arguments, output_attentions=True).attentions
    width = arguments["input_ids"].shape[1]
    visible = torch.ones(width, width, dtype=torch.bool).tril()
    assert len(attentions) == 2
    for attention in attentions:
        for row, place in enumerate(places):
            sees = visible.clone()
            sees[:, : place.start] = False
            assert (attention[row, :, ~sees] == 0).all()
            assert (attention[row, :, sees] >= 0.25 - 1e-6).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_are_returned(family, device):
    """Also where a kernel would keep them out of memory, for the first call and the next."""
    model = prepared(FAMILIES[family]().to(device, torch.bfloat16), "min_max")
    ids = tokens().to(device)
    with torch.no_grad():
        logits(model, ids)
        for _ in range(2):
            attentions = model(input_ids=ids, output_attentions=True).attentions
            assert len(attentions) == 2
            assert all(a.shape[-2:] == (ids.shape[1], ids.shape[1]) for a in attentions)


# In float64 no rounding error of a sum reaches a tie of the quantizers: results are equal.


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_steps_equal_the_whole(family, device):
    model = prepared(FAMILIES[family]()).double().to(device)
    batch = tokens(3, 10).to(device)
    expected = logits(model, batch)
    # Its name changed in transformers 5.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    steps, cache = [], transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        for part in batch.split([4, 1, 1, 3, 1], dim=1):
            steps.append(model(part, **{name: cache}, use_cache=True).logits)
    assert_close(torch.cat(steps, 1), expected, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, device):
    model = prepared(FAMILIES[family]()).double().to(device)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    batch = tokens(3, 4).to(device)
    cached, uncached = (model.generate(batch, use_cache=use, **options) for use in (True, False))
    assert cached.sequences.shape == (3, 12)
    assert torch.equal(cached.sequences, uncached.sequences)
    expected = logits(model, cached.sequences).float()
    # generate() keeps logits in float32.
    assert_close(torch.stack(cached.logits, 1), expected[:, 3:-1], 1e-7)
    assert torch.equal(cached.sequences[:, 4:], expected[:, 3:-1].argmax(-1))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_equals_single_rows(family, side, device):
    model = prepared(FAMILIES[family]()).double().to(device)
    arguments, places = padded(side)
    arguments = on(device, arguments)
    together = logits(model, **arguments)
    for row, place in enumerate(places):
        alone = logits(model, arguments["input_ids"][row : row + 1, place])
        assert_close(together[row, place], alone[0], 1e-12)


# ---- tied weights ------------------------------------------------------------------------------


class Counter:
    """The operators, with a count of the calls on a weight."""

    def __init__(self, weight):
        self.weight, self.count = weight, 0

    def __getattr__(self, name):
        def call(x, *ranges, **options):
            self.count += x is self.weight
            return getattr(asymq, name)(x, *ranges, **options)

        return call


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_share_a_quantizer(family, device):
    model = prepared(FAMILIES[family]().to(device))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    assert head.weight_quantizer is embedding.weight_quantizer
    batch = tokens().to(device)
    with use_namespace(Counter(embedding.weight)) as counter:
        for repeat in (1, 2):
            model(batch)
            assert counter.count == repeat  # once a forward, not once and for all
        hidden = torch.randn(2, model.config.hidden_size, device=device)
        head(hidden)
        head(hidden)
        embedding(batch)
        assert counter.count == 5  # outside the model's forward nobody else's result
    grid = embedding.weight_quantizer.fake_quantize(embedding.weight)
    head.output_quantizer.state = "off"
    assert_bit_equal(head(hidden), hidden @ grid.t())


def test_tied_weights_get_both_gradients():
    """The shared range learns from the embedding and from the head."""
    model = prepared(gpt2())
    quantizer = model.transformer.wte.weight_quantizer
    batch = torch.full((1, 4), 5)
    model(batch).logits[..., 5:8].sum().backward()
    assert quantizer.gamma.grad[5:8].all()
    used = torch.zeros(VOCABULARY, dtype=torch.bool)
    used[5:8] = True
    assert not quantizer.gamma.grad[~used].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_stale(family, device):
    model = prepared(FAMILIES[family]().to(device))
    quantizer = model.get_input_embeddings().weight_quantizer
    batch = tokens().to(device)
    fresh = copy.deepcopy(model)

    def equal():
        fresh.load_state_dict(model.state_dict())
        assert_bit_equal(logits(model, batch), logits(fresh, batch))

    equal()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        next_token_loss(model, batch).backward()
        optimizer.step()
        before = logits(model, batch)
        equal()

    with pytest.raises(Exception, match=r"index|range|assert|position|size|exceed"):
        model(tokens(1, 4).to(device), position_ids=torch.zeros(1, 5, dtype=torch.long))
    with torch.no_grad():
        quantizer.gamma.mul_(0.5)
    assert not torch.equal(logits(model, batch), before)
    equal()
    with torch.no_grad():
        quantizer.gamma.mul_(2)
    assert_bit_equal(logits(model, batch), before)


def test_a_result_is_not_kept_without_gradient():
    """A forward under no_grad leaves nothing for the next one, which needs gradients."""
    model = prepared(gpt2())
    logits(model, tokens())
    next_token_loss(model, tokens()).backward()
    assert model.transformer.wte.weight_quantizer.gamma.grad.any()
    assert model.transformer.wte.weight.grad.any()
