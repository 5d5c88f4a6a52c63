"""Who owns a weight: ties, views, users that are not quantized, and what is shared in a forward."""

import copy
import threading

import pytest
import torch
from compare import assert_bit_equal
from safetensors.torch import load_file
from tiny_models import gpt2, logits, next_token_loss, prepared, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import asymq
from asymq import PerChannel, PerGroup, QuantConfig, QuantSpec
from asymq.layers.loss import unquantized
from asymq.quantizers import named_quantizers

WEIGHTS = QuantConfig(weight=QuantSpec(4, True, PerChannel(), "min_max"))


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: what it returns is not its weight's rows."""

    def forward(self, indices):
        return 4 * super().forward(indices)


class Foreign(nn.Module):
    """A user of a weight that asymq knows nothing of."""

    def __init__(self, weight):
        super().__init__()
        self.table = weight

    def forward(self, indices):
        return 4 * self.table[indices]


class Tied(nn.Module):
    def __init__(self, embedding=None, head=None):
        super().__init__()
        self.e = embedding or ScaledEmbedding(10, 4)
        self.o = head or nn.Linear(4, 10, bias=False)
        if head is None:
            self.o.weight = next(self.e.parameters())

    def forward(self, indices):
        return self.o(self.e(indices))


INDICES = torch.arange(10).view(2, 5)

# ---- all users of one tensor ---------------------------------------------------------------------


def test_convert_keeps_what_a_tied_model_computes(device):
    model, indices = Tied().to(device), INDICES.to(device)
    asymq.prepare(model, WEIGHTS)
    assert [name for name, _ in named_quantizers(model)] == ["e.weight_quantizer"]
    assert model.o.weight_quantizer is model.e.weight_quantizer
    asymq.calibrate(model, [indices])
    expected = model(indices)
    asymq.convert(model)
    assert_bit_equal(model(indices), expected)
    assert model.o.weight is model.e.weight


def refused(model, match, config=WEIGHTS):
    before = repr(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=match):
        asymq.prepare(model, config)
    assert (repr(model), [type(m) for m in model.modules()]) == before


def test_a_user_that_is_not_quantized():
    head = nn.Linear(4, 10, bias=False)
    model = Tied(Foreign(head.weight), head)
    refused(model, r"o\.weight is also e\.table \(Foreign\).*skip o\.weight_quantizer")
    # The way out that it names.
    config = QuantConfig(WEIGHTS.weight, QuantSpec(), skip=("o.weight_quantizer",))
    asymq.prepare(model, config)
    assert [name for name, _ in named_quantizers(model)] == ["o.output_quantizer"]


def test_an_embedding_that_cannot_be_quantized():
    embedding = nn.Embedding(10, 4, sparse=True)
    head = nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    refused(Tied(embedding, head), r"o\.weight is also e\.weight \(Embedding\)")


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w[:4],
        lambda w: w[2:6],
        lambda w: w[:, 1:],
        lambda w: w.t(),
    ],
    ids=["rows", "inner rows", "columns", "transposed"],
)
def test_views_of_a_weight_are_refused(view):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(view(model[0].weight.detach()))
    refused(model, r"0\.weight and 1\.weight overlap in memory")


@pytest.mark.parametrize("split", ["rows", "columns"])
def test_parts_of_one_buffer_that_do_not_overlap(split):
    buffer = torch.randn(8, 8)
    parts = (buffer[:4], buffer[4:]) if split == "rows" else (buffer[:, :4], buffer[:, 4:])
    model = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in parts])
    for layer, part in zip(model, parts, strict=True):
        layer.weight = nn.Parameter(part)
    asymq.prepare(model, WEIGHTS)
    quantizers = [q for _, q in named_quantizers(model)]
    assert len(quantizers) == 2 and not any(q.users > 1 for q in quantizers)


def test_a_tie_by_memory():
    """Two parameters of the same elements."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    asymq.prepare(model, WEIGHTS)
    assert model[0].weight_quantizer is model[1].weight_quantizer
    x = torch.randn(3, 4)
    asymq.calibrate(model, [x])
    model(x).sum().backward()
    assert model[0].weight.grad is not None and model[1].weight.grad is not None
    assert not torch.equal(model[0].weight.grad, model[1].weight.grad)
    expected = model(x)
    asymq.convert(model)
    assert_bit_equal(model(x), expected)


def test_meta_tensors_go_by_identity():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
        model[2].weight = model[0].weight
    asymq.prepare(model, WEIGHTS)
    assert [name for name, _ in named_quantizers(model)] == [
        "0.weight_quantizer",
        "1.weight_quantizer",
    ]


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(2)], ids=str)
def test_users_that_want_different_ranges(granularity):
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4))
    model[1].weight = model[0].weight
    config = QuantConfig(QuantSpec(4, True, granularity, "min_max"))
    refused(model, r"0\.weight and 1\.weight are one tensor, of which .* different ranges", config)
    asymq.prepare(model, QuantConfig(QuantSpec(4, True, parameterization="min_max")))
    assert model[0].weight_quantizer is model[1].weight_quantizer


def test_another_name_of_a_shared_quantizer():
    overrides = {"lm_head.weight_quantizer": QuantSpec(8)}
    match = r"lm_head\.weight_quantizer is transformer\.wte\.weight_quantizer, since"
    refused(gpt2(), match, QuantConfig(WEIGHTS.weight, overrides=overrides))


def test_a_state_writes_a_shared_quantizer_once():
    model = prepared(gpt2())
    keys = list(model.state_dict())
    assert len(keys) == len(set(keys))
    assert "transformer.wte.weight_quantizer.gamma" in keys
    assert not any(key.startswith("lm_head.weight_quantizer") for key in keys)
    # Of a part alone, under the part's name; and as before afterwards, also within a wrapper.
    assert "weight_quantizer.gamma" in model.lm_head.state_dict()
    assert list(model.state_dict()) == keys
    wrapper = nn.ModuleDict({"a": model, "b": copy.deepcopy(model)})
    assert len(wrapper.state_dict()) == 2 * len(keys)
    assert len(list(named_quantizers(wrapper))) == 2 * len(list(named_quantizers(model)))
    # A copy made after that is another quantizer.
    wrapper["c"] = copy.deepcopy(wrapper["a"])
    assert len(wrapper.state_dict()) == 3 * len(keys)


# ---- a tie that is broken ------------------------------------------------------------------------


def untie_by_assign(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = {name: tensor.clone() for name, tensor in torch.load(tmp_path / "state.pt").items()}
    model.load_state_dict(state, assign=True)


def untie_by_setting(model, tmp_path):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


@pytest.mark.parametrize("untie", [untie_by_assign, untie_by_setting])
def test_a_broken_tie_is_noticed(untie, tmp_path):
    model = prepared(gpt2())
    expected = logits(model, tokens())
    untie(model, tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for use in (lambda: model(tokens()), lambda: asymq.convert(model)):
        with pytest.raises((RuntimeError, ValueError), match=r"tie them again \(model\.tie_weigh"):
            use()
    model.tie_weights()
    assert_bit_equal(logits(model, tokens()), expected)


# ---- what is shared within a forward -------------------------------------------------------------


class Twice(nn.Module):
    """Two layers of one weight, between which `inner` does something."""

    def __init__(self, inner):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        self.inner = inner

    def forward(self, x):
        return self.inner(self, x)


def without_grad_first(m, x):
    with torch.no_grad():
        g = m.b(m.a(x))
    return m.b(m.a(x + g))


def in_inference_mode_first(m, x):
    with torch.inference_mode():
        m.b(m.a(x))
    return m.b(m.a(x))


def checkpointed(reentrant, first):
    def forward(m, x):
        region = lambda y: checkpoint(m.a, y, use_reentrant=reentrant)  # noqa: E731
        return m.b(region(x)) if first else region(m.b(x))

    return forward


def with_a_hook(m, x):
    """Somebody changes the weight in the middle of a forward."""
    with torch.no_grad():
        y = m.a(x)
        m.a.weight.mul_(0.5)
        y = m.b(y)
        m.a.weight.mul_(2)
    return m.a(y)


def in_a_thread(m, x):
    results = []
    thread = threading.Thread(target=lambda: results.append(m.a(x)))
    thread.start()
    thread.join()
    return m.b(results[0])


CASES = {
    "plain": lambda m, x: m.b(m.a(x)),
    "no_grad": without_grad_first,
    "inference_mode": in_inference_mode_first,
    "checkpoint first": checkpointed(False, True),
    "checkpoint second": checkpointed(False, False),
    "reentrant first": checkpointed(True, True),
    "reentrant second": checkpointed(True, False),
    "changed": with_a_hook,
    "thread": in_a_thread,
}


@pytest.mark.parametrize("case", CASES)
def test_sharing_changes_no_gradient(case, device):
    torch.manual_seed(1)
    model = Twice(CASES[case]).to(device)
    x = torch.randn(3, 4, device=device, requires_grad=True)
    asymq.prepare(model, WEIGHTS)
    asymq.calibrate(model, [torch.randn(3, 4, device=device)])
    results = []
    for shared in (True, False):
        model.zero_grad()
        model.a.weight_quantizer.users = 2 if shared else 1
        y = model(x)
        y.square().sum().backward()
        results.append((y.detach(), model.a.weight.grad.clone()))
    for actual, expected in zip(*results, strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_a_weight_is_quantized_once_a_forward():
    model = Twice(CASES["plain"])
    asymq.prepare(model, WEIGHTS)
    asymq.calibrate(model, [torch.randn(3, 4)])
    quantized = []
    for layer in (model.a, model.b):
        layer.register_forward_hook(lambda m, a, y: quantized.append(m.quantized_weight()))
    model(torch.randn(3, 4))
    assert quantized[0] is quantized[1]
    model(torch.randn(3, 4))
    assert quantized[2] is not quantized[0]


# ---- logits beside which something is kept -------------------------------------------------------


def lower_some(m, a, y):
    y[..., 32:] = -1e4


@pytest.mark.parametrize("change", ["hook", "after", "float hook"])
def test_the_loss_is_that_of_the_logits_returned(change):
    model, batch = prepared(gpt2()), tokens()
    if change == "hook":
        model.lm_head.register_forward_hook(lower_some)
        out = model(batch, labels=batch)
    elif change == "float hook":
        model.lm_head.register_forward_hook(lambda m, a, y: 2 * y)
        out = model(batch, labels=batch)
    else:
        out = model(batch)
        with torch.no_grad():
            out.logits[..., 32:] = -1e4
        out.loss = model.loss_function(out.logits, batch, model.config.vocab_size)
    targets = batch[:, 1:].flatten()
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_loss_of_an_evaluation(mode):
    """Its logits keep nothing, and those of inference mode have no version to compare."""
    model, batch = prepared(gpt2()), tokens()
    expected = model(batch, labels=batch).loss
    with mode():
        loss = model(batch, labels=batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_what_is_kept_does_not_travel(tmp_path):
    model, batch = prepared(gpt2()), tokens()
    out = model(batch)
    assert unquantized(out.logits) is not None
    torch.save(out.logits, tmp_path / "logits.pt")
    size = (tmp_path / "logits.pt").stat().st_size
    assert size < 2 * out.logits.numel() * 4
    assert unquantized(torch.load(tmp_path / "logits.pt")) is None
    assert unquantized(out.logits.detach()) is None
    assert unquantized(out.logits.detach().clone()) is None


# ---- families below the root, wrappers -----------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm = gpt2()
        self.score = nn.Linear(96, 1)

    def forward(self, ids):
        return self.score(self.lm(ids).logits)


def test_a_family_below_the_root():
    model, alone = Wrapper(), asymq.prepare(gpt2(), QuantConfig.table2("min_max"))
    asymq.prepare(model, QuantConfig.table2("min_max"))
    names = {name for name, _ in named_quantizers(model)}
    expected = {f"lm.{name}" for name, _ in named_quantizers(alone)}
    assert names == expected | {"score.weight_quantizer", "score.output_quantizer"}
    asymq.calibrate(model, [tokens()])
    assert model.lm.config._attn_implementation == "asymq"
    loss = model.lm(tokens(), labels=tokens()).loss
    loss.backward()
    asymq.convert(model)
    assert type(model) is Wrapper and type(model.lm) is type(gpt2())
    assert model.lm.config._attn_implementation != "asymq"


@pytest.mark.parametrize(
    "wrap, inner",
    [
        (lambda m: torch.compile(m), "_orig_mod"),
        (lambda m: nn.DataParallel(m), "module"),
        (lambda m: torch.optim.swa_utils.AveragedModel(m), "module"),
    ],
    ids=["compile", "DataParallel", "AveragedModel"],
)
def test_wrapped_models(wrap, inner, tmp_path):
    """prepare names the model within; save writes the names that load knows."""
    model = gpt2()
    wrapped = wrap(model)
    with pytest.raises(ValueError, match=f"wraps a model.*: prepare model.{inner} first, then wra"):
        asymq.prepare(wrapped, QuantConfig.table2("min_max"))
    assert not any(named_quantizers(wrapped))

    model = prepared(model, "min_max")
    wrapped = wrap(model)
    model.cpu()  # where there is a GPU, DataParallel has moved it there
    asymq.save(wrapped, tmp_path)
    assert not any(
        name.startswith(("module.", "_orig_mod."))
        for name in load_file(tmp_path / "model.safetensors")
    )
    assert_bit_equal(logits(asymq.load(tmp_path), tokens()), logits(model, tokens()))


# ---- reached, or said ----------------------------------------------------------------------------


class Reads(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.l, self.m = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.m(nn.functional.linear(x, self.l.weight))


def test_calibration_names_what_no_forward_reached():
    model = asymq.prepare(Reads(), WEIGHTS)
    with pytest.warns(UserWarning, match=r"calibration did not use l\.weight_quantizer: ") as found:
        asymq.calibrate(model, [torch.randn(3, 4)])
    assert len(found) == 1


def test_the_first_forward_names_what_it_did_not_reach():
    calibrated = asymq.prepare(Reads(), WEIGHTS)
    with pytest.warns(UserWarning):
        asymq.calibrate(calibrated, [torch.randn(3, 4)])
    model = asymq.prepare(Reads(), WEIGHTS)
    model.load_state_dict(calibrated.state_dict())
    with pytest.warns(UserWarning, match=r"first forward .* did not use l\.weight_quantizer"):
        model(torch.randn(3, 4))
    model(torch.randn(3, 4))  # once; a second warning would be an error


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_attention_that_knows_no_quantizers(implementation):
    model = prepared(gpt2())
    model.set_attn_implementation(implementation)
    with pytest.raises(RuntimeError, match=f"h.0.attn.scores_quantizer: .*'{implementation}' know"):
        model(tokens())
    asymq.disable_quantizers(model)
    model(tokens())
    asymq.enable_quantizers(model)
    model.set_attn_implementation("asymq")
    assert next_token_loss(model, tokens()).isfinite()


def test_arguments_that_a_prepared_block_cannot_use():
    model = prepared(gpt2())
    with pytest.raises(ValueError, match="no cross attention: encoder_hidden_states must be None"):
        model(tokens(), encoder_hidden_states=torch.randn(2, 5, 32))


def test_a_models_own_quantizers_stay():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gate = nn.Linear(4, 4), asymq.QuantAct(QuantSpec(4))

        def forward(self, x):
            return self.gate(torch.sigmoid(self.linear(x)))

    model = asymq.prepare(nn.Sequential(Gate(), nn.Linear(4, 2)), WEIGHTS)
    assert model[0].gate.name == "0.gate"
    assert [n for n, _ in named_quantizers(model)] == [
        "0.linear.weight_quantizer",
        "0.gate",
        "1.weight_quantizer",
    ]
    x = torch.randn(5, 4)
    asymq.calibrate(model, [x])
    assert model[0].gate.calibrated
    with pytest.raises(ValueError, match="has quantizers already"):
        asymq.prepare(model, WEIGHTS)


def test_a_models_own_quantizers_are_saved(tmp_path):
    def build():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, 4), asymq.QuantAct(QuantSpec(4)))

    model, x = asymq.prepare(build(), WEIGHTS), torch.randn(5, 4)
    asymq.calibrate(model, [x])
    asymq.save(model, tmp_path)
    assert_bit_equal(asymq.load(tmp_path, build())(x), model(x))


# ---- models whose embedding is more than its weight's rows --------------------------------------


def gemma():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 96}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, query_pre_attn_scalar=8))


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {
        "vocab_size": 96,
        "d_model": 16,
        "max_position_embeddings": 32,
        "scale_embedding": True,
    }
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(**sizes))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [gemma, bart])
def test_weights_alone_convert_to_what_was_trained(make, tmp_path):
    model = make().eval()
    expected = logits(model, tokens())
    asymq.prepare(model, WEIGHTS)
    asymq.disable_quantizers(model)
    assert_bit_equal(logits(model, tokens()), expected)
    asymq.calibrate(model, [tokens()])
    assert all(quantizer.reached for _, quantizer in named_quantizers(model))
    quantized = logits(model, tokens())
    asymq.save(model, tmp_path)
    assert_bit_equal(logits(asymq.load(tmp_path), tokens()), quantized)
    asymq.convert(model)
    assert_bit_equal(logits(model, tokens()), quantized)
    assert not torch.equal(quantized, expected)
