"""The one way in and out: what a module is before, while and after it has quantizers."""

import copy
import inspect
import subprocess
import sys
import threading

import pytest
import torch
from compare import assert_bit_equal
from operator_calls import OperatorCalls
from tiny_models import COPIES, FAMILIES, gpt2, logits, next_token_loss, opt, prepared, tokens
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import asymq
from asymq import QuantConfig, QuantSpec
from asymq.layers import Quantized
from asymq.quantizers import named_quantizers

SPEC = QuantSpec(bits=4, parameterization="min_max")
EVERYTHING = QuantConfig(SPEC, SPEC, SPEC)
WEIGHTS = QuantConfig(weight=QuantSpec(4, True, asymq.PerChannel(), "min_max"))


class Scaled(nn.Linear):
    """A layer with a forward of its own, which reads its weight twice."""

    factor = 0.5

    def forward(self, x):
        return self.factor * super().forward(x) + 0 * F.linear(x, self.weight)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    def forward(self, indices):
        return 4 * super().forward(indices)


class ShiftedNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = ScaledEmbedding(10, 8)
        self.layer = Scaled(8, 8)
        self.norm = ShiftedNorm(8)
        self.head = nn.Linear(8, 10)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, indices):
        return self.head(self.norm(torch.relu(self.layer(self.embedding(indices)))))


BATCH = torch.arange(10).view(2, 5)


def calibrated(model, config=EVERYTHING, batch=BATCH):
    asymq.prepare(model, config)
    asymq.calibrate(model, [batch])
    return model


# ---- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_objects_stay(family):
    model = FAMILIES[family]()
    before = [(name, module, type(module)) for name, module in model.named_modules()]
    parameters = dict(model.named_parameters())
    attributes = {name: set(vars(module)) for name, module, _ in before}
    handles = [module.register_forward_hook(lambda *_: None) for _, module, _ in before]
    prepared(model)
    after = {n: m for n, m in model.named_modules() if "quantizer" not in n}
    assert list(after) == [name for name, _, _ in before]
    for name, module, cls in before:
        assert after[name] is module and isinstance(module, cls), name
        names = (cls.__name__, f"Quant{cls.__name__}", "QuantLogits")
        assert type(module).__name__ in names
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter
    assert inspect.signature(model.forward) == inspect.signature(FAMILIES[family]().forward)
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks for _, module, _ in before)
    asymq.convert(model)
    for name, module, cls in before:
        assert type(module) is cls and set(vars(module)) == attributes[name], name


def test_a_hook_that_was_removed_does_not_run():
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), []
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in model]
    calibrated(model, batch=torch.randn(3, 4))
    assert len(calls) == 2
    for handle in handles:
        handle.remove()
    model(torch.randn(3, 4))
    assert len(calls) == 2


def test_names_that_others_know_classes_by():
    from accelerate.utils.dataclasses import get_module_class_from_name

    for family in FAMILIES:
        model = prepared(FAMILIES[family]())
        for name in model._no_split_modules:
            assert get_module_class_from_name(model, name) is not None, name
        assert type(model).__name__ == type(FAMILIES[family]()).__name__
        assert model._can_set_attn_implementation()


# ---- subclasses keep their forward ---------------------------------------------------------------


def test_subclasses_keep_their_forward(device):
    model, batch = Net().to(device), BATCH.to(device)
    expected = model(batch)
    calibrated(model, batch=batch)
    assert [name for name, _ in named_quantizers(model)] == [
        "embedding.weight_quantizer",
        "layer.weight_quantizer",
        "layer.output_quantizer",
        "norm.weight_quantizer",
        "norm.output_quantizer",
        "head.weight_quantizer",
        "head.output_quantizer",
    ]
    assert isinstance(model.layer, Scaled) and isinstance(model.layer, asymq.QuantLinear)
    quantized = model(batch)
    assert not torch.equal(quantized, expected)
    asymq.disable_quantizers(model)
    assert_bit_equal(model(batch), expected)
    asymq.enable_quantizers(model)
    assert_bit_equal(model(batch), quantized)
    model(batch).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())

    # One after the other, as the float forward of the same values.
    layer = model.layer
    x = torch.randn(3, 8, device=device)
    weight = layer.weight_quantizer(layer.weight)
    assert_bit_equal(layer(x), layer.output_quantizer(0.5 * F.linear(x, weight, layer.bias)))
    asymq.convert(model)
    assert type(layer) is Scaled and type(model) is Net
    assert_bit_equal(layer(x), 0.5 * F.linear(x, weight, layer.bias))


def test_a_weight_is_its_parameter_outside_of_its_forward():
    model = calibrated(Net())
    layer = model.layer
    assert isinstance(layer.weight, nn.Parameter) and layer.weight is layer._parameters["weight"]
    other = torch.randn(8, 8)
    with torch.no_grad():
        layer.weight.copy_(other)
    assert_bit_equal(layer.weight.detach(), other)
    layer.weight = nn.Parameter(2 * other)
    assert_bit_equal(model.state_dict()["layer.weight"], 2 * other)

    # In another thread, too, while a forward runs.
    seen = []
    model.layer.factor = _Watcher(lambda: seen.append(layer.weight))
    model(BATCH)
    assert len(seen) == 1 and seen[0] is layer._parameters["weight"]


class _Watcher:
    """A factor that looks at something in another thread when it is used."""

    def __init__(self, look):
        self.look = look

    def __mul__(self, x):
        thread = threading.Thread(target=self.look)
        thread.start()
        thread.join()
        return 0.5 * x


def test_a_replica_quantizes_too():
    """Made as DataParallel makes it: tensors in the place of parameters."""
    layer = calibrated(Net()).layer
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(replica, name, 1 * parameter)
    x = torch.randn(3, 8)
    assert "weight" not in replica._parameters
    assert_bit_equal(replica(x), layer(x))
    replica(x).sum().backward()
    assert layer.weight.grad.any() and layer.weight_quantizer.max.grad.any()


def test_each_parameter_is_quantized_once_a_forward():
    model = calibrated(Net())
    calls = []
    model.layer.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    model(BATCH)
    assert len(calls) == 1


def test_functional_call():
    model = calibrated(Net())
    changed = {"layer.weight": 2 * model.layer.weight.detach()}
    actual = torch.func.functional_call(model, changed, (BATCH,))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layer.weight.mul_(2)
    assert_bit_equal(actual, twin(BATCH))


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_classes_made_at_run_time(how):
    model = calibrated(Net())
    twin = COPIES[how](model)
    assert type(twin) is type(model) and type(twin.layer) is type(model.layer)
    assert_bit_equal(twin(BATCH), model(BATCH))
    asymq.convert(twin)
    assert type(twin.layer) is Scaled and isinstance(model.layer, Quantized)


def test_a_pickle_opens_in_a_new_process(tmp_path):
    layer = nn.Sequential(nn.Linear(4, 3), nn.CELU())
    model = calibrated(layer, batch=torch.randn(5, 4))
    x = torch.randn(2, 4)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(model(x), y)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.pt"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_subclasses_compile(device):
    model, batch = calibrated(Net()).to(device), BATCH.to(device)
    expected = model(batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_bit_equal(compiled(batch), expected)
    compiled(batch).sum().backward()
    actual = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(batch).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-6, atol=1e-6)


# ---- weights that cannot be read through a quantizer ---------------------------------------------


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_computed_weights_are_refused(how):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    COMPUTED[how](model[0])
    before = repr(model)
    with pytest.raises(ValueError, match=r"0: its weight is computed .*remove_parametrizations"):
        asymq.prepare(model, WEIGHTS)
    assert repr(model) == before and not any(named_quantizers(model))


def test_other_weights_that_cannot_be_read():
    with pytest.raises(ValueError, match="0: its weight has no shape yet; run a batch"):
        asymq.prepare(nn.Sequential(nn.LazyLinear(4)), WEIGHTS)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.warns(UserWarning, match="left alone: 1 Linear"):
        asymq.prepare(model, WEIGHTS)
    assert [name for name, _ in named_quantizers(model)] == ["1.weight_quantizer"]


class Block(__import__("transformers").models.gpt2.modeling_gpt2.GPT2Block):
    def forward(self, *args, **kwargs):
        return 0.5 * super().forward(*args, **kwargs)


class Head(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


def with_class(model, name, cls):
    model.get_submodule(name).__class__ = cls
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subclass_at_a_site_of_a_family(family):
    model = with_class(FAMILIES[family](), "lm_head", Head)
    model.set_attn_implementation("eager")
    expected = logits(model, tokens())
    prepared(model)
    asymq.disable_quantizers(model)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-6, atol=1e-6)
    asymq.enable_quantizers(model)
    assert next_token_loss(model, tokens()).isfinite()
    asymq.convert(model)
    assert type(model.lm_head) is Head


def test_a_block_with_a_forward_of_its_own_is_refused():
    model = with_class(gpt2(), "transformer.h.1", Block)
    sites = [f"transformer.h.1.{s}_quantizer" for s in ("attention_sum", "mlp_sum")]
    with pytest.raises(ValueError, match=f"h.1 is a Block .* cannot place {', '.join(sites)}"):
        asymq.prepare(model, EVERYTHING)
    assert type(model.transformer.h[0]).__name__ == "GPT2Block"


def test_another_layer_at_a_site_is_refused_by_name():
    model = gpt2()
    model.transformer.h[1].mlp.c_proj = nn.Bilinear(64, 64, 32)
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_proj is a Bilinear, whose weight"):
        asymq.prepare(model, EVERYTHING)


# ---- fused pairs -------------------------------------------------------------------------------


def used(model, batch):
    with OperatorCalls() as recorder:
        result = model(batch, labels=batch)
    names = [function.__name__ for function, _ in recorder.calls]
    return result, sum("_quantized_gelu" in name for name in names)


def test_a_child_is_skipped_only_where_nobody_can_notice():
    model, batch = prepared(gpt2()), tokens()
    expected, count = used(model, batch)
    assert count == 2
    c_fc = model.transformer.h[0].mlp.c_fc
    seen = []
    hooks = {
        "forward": lambda: c_fc.register_forward_hook(lambda m, a, y: seen.append(y)),
        "pre": lambda: c_fc.register_forward_pre_hook(lambda m, a: seen.append(a)),
        "activation": lambda: model.transformer.h[0].mlp.act.register_forward_hook(
            lambda m, a, y: seen.append(y)
        ),
        "quantizer": lambda: c_fc.output_quantizer.register_forward_hook(
            lambda m, a, y: seen.append(y)
        ),
    }
    for name, register in hooks.items():
        handle = register()
        result, count = used(model, batch)
        assert count == 1 and len(seen) == 1, name
        seen.clear()
        handle.remove()
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)
    # What c_fc returns is on the grid of the quantizer that it prints.
    handle = hooks["forward"]()
    model(batch)
    assert_bit_equal(seen[0], c_fc.output_quantizer(seen[0]))
    handle.remove()
    assert used(model, batch)[1] == 2
    c_fc.forward = lambda x: type(c_fc).forward(c_fc, x)
    assert used(model, batch)[1] == 1


def test_a_globally_hooked_model_fuses_nothing():
    model, batch, seen = prepared(gpt2()), tokens(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.add(m))
    _, count = used(model, batch)
    handle.remove()
    assert count == 0
    assert {q for _, q in named_quantizers(model)} <= seen


def test_accelerates_hooks_are_called():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubled(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    model, batch = prepared(gpt2()), tokens()
    before = logits(model, batch)
    add_hook_to_module(model.transformer.h[0].mlp.c_fc, Doubled())
    assert used(model, batch)[1] == 1
    assert not torch.equal(logits(model, batch), before)


# ---- way back ----------------------------------------------------------------------------------


def test_the_fast_path_of_encoders_comes_back():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    values = [layer.activation_relu_or_gelu for layer in model.layers]
    types = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match="MultiheadAttention"):
        asymq.prepare(model, EVERYTHING)
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [0, 0]
    asymq.calibrate(model, [torch.randn(2, 5, 16)])
    asymq.convert(model)
    assert [layer.activation_relu_or_gelu for layer in model.layers] == values != [0, 0]
    assert [type(m) for m in model.modules()] == types


def test_a_loss_function_set_after_prepare_stays():
    model = prepared(gpt2())

    def own(logits, labels, vocab_size, **_):
        return logits.sum()

    model.loss_function = own
    assert model.loss_function is own
    asymq.convert(model)
    assert model.loss_function is own


def test_layers_made_by_hand_convert():
    model = nn.Sequential(asymq.QuantLinear(4, 3, output=SPEC), nn.ReLU(), asymq.QuantAct(SPEC))
    x = torch.randn(5, 4)
    asymq.calibrate(model, [x])
    weight = model[0].weight_quantizer(model[0].weight).detach()
    asymq.convert(model)
    assert type(model[0]) is nn.Linear and type(model[2]) is nn.Identity
    assert_bit_equal(model[0].weight.detach(), weight)


def test_inputs_of_layers():
    """QuantLinear(..., input=): what it multiplies its weight with."""
    layer = asymq.QuantLinear(4, 3, weight=None, input=SPEC)
    x = torch.randn(5, 4)
    asymq.calibrate(layer, [x])
    assert_bit_equal(layer(x), F.linear(layer.input_quantizer(x), layer.weight, layer.bias))
    scaled = asymq.QuantLinear.from_float(Scaled(4, 3), None, None, SPEC)
    asymq.calibrate(scaled, [x])
    expected = 0.5 * F.linear(scaled.input_quantizer(x), scaled.weight, scaled.bias)
    assert_bit_equal(scaled(x), expected)
    assert_bit_equal(scaled(x=x), expected)


def test_arguments_keep_their_names():
    """Callers give them by name."""
    x = torch.randn(5, 4)
    layers = [(nn.Linear(4, 3), x), (nn.LayerNorm(4), x), (nn.Embedding(9, 4), x.long().abs())]
    for layer, argument in layers:
        model = calibrated(nn.Sequential(layer), batch=argument)
        assert_bit_equal(layer(input=argument), model(argument))


def test_embeddings_have_no_other_quantizers():
    with pytest.raises(ValueError, match="output and input must be None"):
        asymq.QuantEmbedding.from_float(nn.Embedding(4, 4), output=SPEC)


def test_conv1d_becomes_a_conv1d():
    from transformers.pytorch_utils import Conv1D

    layer = asymq.QuantLinear.from_float(Conv1D(8, 12))
    assert type(layer) is asymq.QuantConv1D and isinstance(layer, Conv1D)
    assert not isinstance(layer, nn.Linear)
    made = asymq.QuantConv1D(8, 12)
    assert made.weight_quantizer.range_shape == (1, 8)


def test_use_functions_is_per_thread_and_nests():
    from asymq.quantizers import functions

    seen = []
    with asymq.use_functions("reference"):
        assert functions.namespace() is asymq.reference and not functions.may_fuse()
        with asymq.use_functions("operators"):
            assert functions.namespace() is asymq.ops and functions.may_fuse()
        assert functions.namespace() is asymq.reference
        thread = threading.Thread(target=lambda: seen.append(functions.namespace()))
        thread.start()
        thread.join()
    assert functions.namespace() is asymq.ops and seen == [asymq.ops]
    switch = asymq.use_functions("unfused")  # a call, from now on
    assert not functions.may_fuse()
    switch.__exit__()
    assert functions.may_fuse()
    with pytest.raises(ValueError, match="must be one of operators, reference, unfused, got 'ref'"):
        asymq.use_functions("ref")


def test_use_functions_reaches_a_model():
    model, batch = prepared(opt()), tokens()
    expected = logits(model, batch)
    for which in ("reference", "unfused"):
        with asymq.use_functions(which), OperatorCalls() as recorder:
            torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
        names = {function.__name__ for function, _ in recorder.calls}
        assert not any("_quantized_" in name for name in names)
        assert bool(names) == (which == "unfused")
