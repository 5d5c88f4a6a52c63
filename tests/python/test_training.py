"""Range parameters, step rules, and training under PyTorch's own tools."""

import copy
import warnings

import numpy as np
import pytest
import torch
from compare import assert_bit_equal
from processes import run
from tiny_models import (
    FAMILIES,
    SETTINGS,
    gpt2,
    logits,
    next_token_loss,
    prepared,
    tokens,
    train,
    transformers,
)
from torch import nn

import asymq
from asymq import QuantConfig, QuantSpec


def ranges_of(model):
    return {n: p for n, p in model.named_parameters() if "quantizer" in n}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual, expected, tolerance):
    """Every tensor within `tolerance` of the largest gradient of its own or a thousandth of all."""
    assert actual.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        size = torch.maximum(value.abs().max(), 1e-3 * largest)
        assert (actual[name] - value).abs().max() <= tolerance * size, name


# ---- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_range_parameters(family, setting):
    model = prepared(FAMILIES[family](), setting)
    (group,) = asymq.range_parameters(model)
    assert {id(p) for p in group["params"]} == {id(p) for p in ranges_of(model).values()}
    assert len(group["params"]) == len(ranges_of(model))
    assert group.keys() == {"params", "weight_decay"} and group["weight_decay"] == 0
    (with_lr,) = asymq.range_parameters(model, lr=0.25)
    assert with_lr["lr"] == 0.25
    # AdamW without a gradient would only decay them.
    optimizer = torch.optim.AdamW(asymq.range_parameters(model), lr=0.1)
    before = {n: p.clone() for n, p in ranges_of(model).items()}
    for parameter in group["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in before.items():
        assert_bit_equal(ranges_of(model)[name], value)


def test_range_parameters_of_a_float_model():
    with pytest.raises(ValueError, match=r"asymq\.range_parameters: the model has no quantizers"):
        asymq.range_parameters(gpt2())


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf"), True, "1e-3"])
def test_a_rate_that_cannot_be(lr):
    with pytest.raises(ValueError, match=r"asymq\.range_parameters: lr must be a finite number"):
        asymq.range_parameters(prepared(gpt2()), lr=lr)


@pytest.mark.parametrize("lr", [0, 0.25, np.float32(0.25), torch.tensor(0.25)])
def test_rates_that_optimizers_take(lr):
    assert asymq.range_parameters(prepared(gpt2()), lr=lr)[0]["lr"] is lr


@pytest.mark.parametrize("family", FAMILIES)
def test_freeze_weights(family, device):
    model = prepared(FAMILIES[family]().to(device))
    asymq.freeze_weights(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(ranges_of(model))
    before = copy.deepcopy(model.state_dict())
    losses = train(model, 8, 1e-2)
    assert losses[-1] < losses[0]
    for name, value in model.state_dict().items():
        if name not in trained:
            assert_bit_equal(value, before[name])
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_range_has_a_gradient(family, setting, device):
    model = prepared(FAMILIES[family]().to(device), setting)
    asymq.freeze_weights(model)
    with torch.no_grad():
        for parameter in ranges_of(model).values():
            parameter.mul_(0.9)
    values = gradients(model, next_token_loss(model, tokens().to(device)))
    assert values.keys() == ranges_of(model).keys()
    for name, value in values.items():
        # A lower end of 0, of probabilities, has nothing below it.
        assert value.any() or name.endswith((".beta", ".offset", ".koffset", ".min")), name
        assert value.isfinite().all(), name


# ---- step rules --------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
}
RULES = {
    "min_max_plus": "min_max",
    "naive": "scale_offset",
    "naive_current": "scale_offset",
    "sophisticated": "scale_offset",
}


def factor(rule, quantizer, name, before):
    """Section 3 of the paper, from the values before the step."""
    if rule in ("min_max_plus", "naive"):
        return getattr(quantizer, f"initial_{name}").abs()
    if rule == "naive_current":
        return before[name].abs()
    if name == "scale":
        return torch.full_like(before[name], 2 / quantizer.spec.steps)
    return 1 / before["scale"].clamp(min=quantizer.spec.eps)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_step_rules_scale_the_step(rule, optimizer, device):
    plain = prepared(gpt2().to(device), RULES[rule])
    with torch.no_grad():  # the first values are not the present ones
        for parameter in ranges_of(plain).values():
            parameter.mul_(0.9)
    ruled = copy.deepcopy(plain)
    optimizers = [OPTIMIZERS[optimizer](asymq.range_parameters(m)) for m in (plain, ruled)]
    asymq.attach_step_rule(optimizers[1], ruled, rule)
    batch = tokens().to(device)
    for _ in range(3):
        quantizers = dict(asymq.named_quantizers(ruled))
        before = {
            key: {n: getattr(q, n).detach().clone() for n in q.learned}
            for key, q in quantizers.items()
        }
        # The same gradients from the same values: only the step itself differs.
        plain.load_state_dict(ruled.state_dict())
        gradients(ruled, next_token_loss(ruled, batch))
        for a, b in zip(plain.parameters(), ruled.parameters(), strict=True):
            a.grad = b.grad.clone()
        for o in optimizers:
            o.step()
        moved = 0
        for key, quantizer in quantizers.items():
            twin = plain.get_submodule(key)
            for name in quantizer.learned:
                old = before[key][name]
                step = getattr(twin, name).detach() - old
                expected = old + factor(rule, quantizer, name, before[key]) * step
                actual = getattr(quantizer, name).detach()
                torch.testing.assert_close(actual, expected, rtol=3e-7, atol=1e-30)
                moved += bool((actual != old).any())
        assert moved > len(quantizers) // 2


def test_a_step_rule_leaves_other_parameters_alone():
    plain = prepared(gpt2(), "min_max")
    ruled = copy.deepcopy(plain)
    for model, rule in ((plain, None), (ruled, "min_max_plus")):
        weights = [p for n, p in model.named_parameters() if "quantizer" not in n]
        groups = [{"params": weights}, *asymq.range_parameters(model, 1e-2)]
        optimizer = torch.optim.Adam(groups, lr=1e-3)
        if rule:
            asymq.attach_step_rule(optimizer, model, rule)
        gradients(model, next_token_loss(model, tokens()))
        optimizer.step()
    for name, value in plain.named_parameters():
        same = torch.equal(value, ruled.get_parameter(name))
        assert same if "quantizer" not in name else True, name
    assert any(not torch.equal(p, ruled.get_parameter(n)) for n, p in ranges_of(plain).items())


def test_a_step_rule_can_be_removed():
    model = prepared(gpt2(), "min_max")
    optimizer = torch.optim.Adam(asymq.range_parameters(model, 1e-2))
    rule = asymq.attach_step_rule(optimizer, model, "min_max_plus")
    rule.remove()
    twin = copy.deepcopy(model)
    other = torch.optim.Adam(asymq.range_parameters(twin, 1e-2))
    for m, o in ((model, optimizer), (twin, other)):
        gradients(m, next_token_loss(m, tokens()))
        o.step()
    for name, value in ranges_of(twin).items():
        assert_bit_equal(model.get_parameter(name), value)


def test_first_values_survive_a_checkpoint():
    """A rule goes on in a new job as it would have in the old one."""
    model = prepared(gpt2(), "min_max")
    train(model, 2, 1e-2)
    again = asymq.prepare(gpt2(), QuantConfig.table2("min_max"))
    again.load_state_dict(model.state_dict())
    for m in (model, again):
        optimizer = torch.optim.SGD(asymq.range_parameters(m), lr=1e-2)
        asymq.attach_step_rule(optimizer, m, "min_max_plus")
        gradients(m, next_token_loss(m, tokens()))
        optimizer.step()
    for name, value in ranges_of(model).items():
        assert_bit_equal(again.get_parameter(name), value)


def test_step_rules_that_do_not_fit():
    model = prepared(gpt2(), "min_max")
    optimizer = torch.optim.SGD(asymq.range_parameters(model), lr=1e-2)
    what = r"asymq\.attach_step_rule"
    with pytest.raises(ValueError, match=f"{what}: unknown rule 'minmax'; there are min_max_plus"):
        asymq.attach_step_rule(optimizer, model, "minmax")
    for rule in ("naive", "naive_current", "sophisticated"):
        with pytest.raises(
            ValueError, match=rf"{what}: {rule} belongs to scale_offset, but .* learns min_max"
        ):
            asymq.attach_step_rule(optimizer, model, rule)
    weights = [p for n, p in model.named_parameters() if "quantizer" not in n]
    with pytest.raises(ValueError, match=f"{what}: the optimizer has none"):
        asymq.attach_step_rule(torch.optim.SGD(weights, lr=1.0), model, "min_max_plus")
    fresh = asymq.prepare(gpt2(), QuantConfig.table2("min_max"))
    optimizer = torch.optim.SGD(asymq.range_parameters(fresh), lr=1e-2)
    with pytest.raises(ValueError, match=f"{what}: transformer.* no first values yet; calibrate"):
        asymq.attach_step_rule(optimizer, fresh, "min_max_plus")


# ---- under PyTorch's tools ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_accumulation(family, device):
    """In float64, where no rounding of a sum reaches a tie."""
    model = prepared(FAMILIES[family]()).double().to(device)
    batch = tokens(4, 12).to(device)
    expected = gradients(model, next_token_loss(model, batch))
    model.zero_grad(set_to_none=False)
    for part in batch.split(1):
        (next_token_loss(model, part) / 4).backward()
    actual = {name: p.grad for name, p in model.named_parameters()}
    assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family, reentrant, device):
    model = prepared(FAMILIES[family](), "min_max").double().to(device).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if family == "opt":
        for layer in model.model.decoder.layers:
            layer.dropout = layer.self_attn.dropout = 0.0
        model.model.decoder.dropout = 0.0
    batch = tokens().to(device)
    expected = gradients(model, next_token_loss(model, batch))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = []
    block = (model.transformer.h if family == "gpt2" else model.model.decoder.layers)[1]
    block.attention_sum_quantizer.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients(model, next_token_loss(model, batch))
    assert len(calls) == 2  # again in the backward
    assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family, device):
    """bfloat16 activations, float32 ranges with float32 gradients."""
    model = prepared(FAMILIES[family]().to(device))
    batch = tokens().to(device)
    expected = gradients(model, next_token_loss(model, batch))
    seen = set()
    for _, quantizer in asymq.named_quantizers(model):
        quantizer.register_forward_hook(
            lambda module, args, result: seen.add((args[0].dtype, result.dtype == args[0].dtype))
        )
    with torch.autocast(device.type, torch.bfloat16):
        loss = next_token_loss(model, batch)
    actual = gradients(model, loss)
    assert (torch.bfloat16, True) in seen and all(same for _, same in seen)
    assert loss.isfinite()
    for name in ranges_of(model):
        assert actual[name].dtype == torch.float32 and actual[name].isfinite().all()
    # Of the same direction: bfloat16 moves many codes by one.
    flat = [torch.cat([g[n].flatten() for n in ranges_of(model)]) for g in (actual, expected)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.9


def test_fp16_with_a_grad_scaler(device):
    model = prepared(gpt2().to(device))
    optimizer = torch.optim.Adam(asymq.range_parameters(model, 1e-3))
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    before = {n: p.detach().clone() for n, p in ranges_of(model).items()}
    skipped = stepped = 0
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = next_token_loss(model, tokens().to(device))
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            assert stepped or all(torch.equal(p, before[n]) for n, p in ranges_of(model).items())
        else:
            stepped += 1
    assert skipped and stepped  # it overflows, backs off, and then trains
    for name, value in ranges_of(model).items():
        assert value.isfinite().all(), name
    assert any(not torch.equal(p, before[n]) for n, p in ranges_of(model).items())


@pytest.mark.parametrize("name", ["linear", "conv1d", "embedding", "layer_norm", "act"])
def test_modules_compile_without_graph_breaks(name, device):
    spec = QuantSpec(4, parameterization="min_max")
    conv1d = transformers.pytorch_utils.Conv1D(4, 6)
    module = {
        "linear": lambda: asymq.QuantLinear(6, 4, output=spec),
        "conv1d": lambda: asymq.QuantLinear.from_float(conv1d, output=spec),
        "embedding": lambda: asymq.QuantEmbedding(9, 6),
        "layer_norm": lambda: asymq.QuantLayerNorm(6, output=spec),
        "act": lambda: asymq.QuantAct(spec),
    }[name]().to(device)
    x = torch.randint(0, 9, (5, 3)) if name == "embedding" else torch.randn(5, 3, 6)
    x = x.to(device)
    asymq.calibrate(module, [x])
    expected = gradients(module, module(x).square().sum())
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_bit_equal(compiled(x), module(x))
    actual = gradients(module, compiled(x).square().sum())
    assert_close(actual, expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_models_compile(family, device):
    """With weights that change between calls, and quantizers that are turned off and on."""
    model = prepared(FAMILIES[family](), "min_max").double().to(device)
    compiled = torch.compile(model, backend="aot_eager")
    batch = tokens().to(device)

    def loss(model):
        # Compiled, the model's own loss is transformers', which rounds its logits to float32.
        out = model(batch, labels=batch)
        targets = batch[:, 1:].flatten()
        return out.loss, torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), targets
        )

    for _ in range(2):
        (own, expected), (compiled_own, actual) = loss(model), loss(compiled)
        torch.testing.assert_close(compiled_own.double(), own.double(), rtol=1e-6, atol=0)
        assert_close(gradients(model, actual), gradients(model, expected), 1e-6)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.95)
    asymq.disable_quantizers(model)
    off = logits(compiled, batch)
    torch.testing.assert_close(off, logits(model, batch), rtol=0, atol=1e-5)
    asymq.enable_quantizers(model)
    assert not torch.equal(logits(compiled, batch), off)


@pytest.mark.slow
def test_inductor(device):
    model = prepared(gpt2(n_layer=1), "min_max").double().to(device)
    compiled = torch.compile(model)
    batch = tokens().to(device)
    expected = gradients(model, next_token_loss(model, batch))
    actual = gradients(model, next_token_loss(compiled, batch))
    # All together: the softmax is float32, and 12 bits magnify its rounding in single ranges.
    assert actual.keys() == expected.keys()
    a, b = (torch.cat([g[n].double().flatten() for n in expected]) for g in (actual, expected))
    assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graph_of_a_training_step(family):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    batches = [tokens(seed=seed).cuda() for seed in range(4)]
    graphed = prepared(FAMILIES[family]().cuda())
    asymq.freeze_weights(graphed)
    eager = copy.deepcopy(graphed)

    def step(model, optimizer, batch):
        optimizer.zero_grad(set_to_none=False)
        loss = next_token_loss(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    def optimizer_of(model):
        return torch.optim.Adam(asymq.range_parameters(model, 1e-3), capturable=True)

    static = batches[0].clone()
    optimizer = optimizer_of(graphed)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(graphed, optimizer, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(graphed, optimizer, static)

    other = optimizer_of(eager)
    for _ in range(3):
        step(eager, other, batches[0])
    for batch in batches:
        static.copy_(batch)
        graph.replay()
        expected = step(eager, other, batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, value in ranges_of(eager).items():
        torch.testing.assert_close(graphed.get_parameter(name), value, rtol=1e-3, atol=1e-4)


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = prepared(gpt2())
    asymq.freeze_weights(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = [{"input_ids": row, "labels": row} for row in tokens(4, 12)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    assert trainer.train().global_step == 2
    for name, value in model.named_parameters():
        if not name.endswith(".beta"):  # a lower end of 0 stays
            assert torch.equal(value, before[name]) == ("quantizer" not in name), name
    # Its checkpoint loads, ranges included.
    from safetensors.torch import load_model

    again = asymq.prepare(gpt2(), QuantConfig.table2("beta_gamma"))
    load_model(again, str(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert_bit_equal(logits(again, tokens()), logits(model.eval(), tokens()))


# ---- two processes -----------------------------------------------------------------------------


def _distributed(rank, folder):
    model = prepared(gpt2()).double()
    wrapped = nn.parallel.DistributedDataParallel(model)
    next_token_loss(wrapped, tokens(4, 12)[2 * rank : 2 * rank + 2]).backward()
    torch.save({n: p.grad for n, p in model.named_parameters()}, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Their gradients are the ones of one process with the whole batch."""
    run(_distributed, tmp_path)
    model = prepared(gpt2()).double()
    expected = gradients(model, next_token_loss(model, tokens(4, 12)))
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_capture_needs_a_gpu():
    for warmup in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"asymq\.capture_step: warmup must be an integer"):
            asymq.capture_step(lambda: None, warmup)
    with pytest.raises(RuntimeError, match=r"asymq\.capture_step: needs a CUDA GPU"):
        asymq.capture_step(lambda: None)


# ---- optimizers that others make -----------------------------------------------------------------


def test_a_step_rule_is_attached_once():
    model = prepared(gpt2(), "min_max")
    optimizer = torch.optim.SGD(asymq.range_parameters(model), lr=1e-2)
    rule = asymq.attach_step_rule(optimizer, model, "min_max_plus")
    with pytest.raises(ValueError, match=r"scales the steps of .* already; remove\(\) that rule"):
        asymq.attach_step_rule(optimizer, model, "min_max_plus")
    rule.remove()
    asymq.attach_step_rule(optimizer, model, "min_max_plus")
    other = torch.optim.SGD(asymq.range_parameters(model), lr=1e-2)
    asymq.attach_step_rule(other, model, "min_max_plus")


def trainer(model, folder, optimizer=None, **arguments):
    pytest.importorskip("accelerate")
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(4, 12)]
    return transformers.Trainer(
        model=model, args=options, train_dataset=data, optimizers=(optimizer, None)
    )


def recipe(model, optimizer_class=torch.optim.AdamW):
    """The README's."""
    weights = {"params": asymq.weight_parameters(model), "weight_decay": 0.1}
    return optimizer_class([weights, *asymq.range_parameters(model, lr=1e-3)], lr=1e-4)


def test_a_plain_trainer_that_decays_ranges_warns_once(tmp_path):
    model = prepared(gpt2())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(model, tmp_path, weight_decay=0.1).train()
    ours = [str(w.message) for w in found if "shrinks by weight decay" in str(w.message)]
    assert len(ours) == 1 and "optimizers=(optimizer, None)" in ours[0]


def test_the_recipe_decays_no_range(tmp_path):
    model = prepared(gpt2())
    optimizer = recipe(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="asymq")
        trainer(model, tmp_path, optimizer, weight_decay=0.1).train()
    ranges = {id(p) for p in ranges_of(model).values()}
    for group in optimizer.param_groups:
        inside = {id(p) in ranges for p in group["params"]}
        assert len(inside) == 1 and (group["weight_decay"] == 0) == inside.pop()


def test_the_recipe_of_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = prepared(gpt2())
    optimizer = recipe(model)
    accelerator = accelerate.Accelerator(cpu=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="asymq")
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(next_token_loss(wrapped, tokens()))
        optimizer.step()


def test_muon_gets_matrices_alone():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = prepared(gpt2())
    next_token_loss(model, tokens()).backward()
    matrices = [p for p in asymq.weight_parameters(model) if p.dim() == 2]
    assert not {id(p) for p in matrices} & {id(p) for p in ranges_of(model).values()}
    torch.optim.Muon(matrices, lr=1e-3).step()
    by_dimension = [p for p in model.parameters() if p.dim() == 2]
    with pytest.warns(UserWarning, match="Muon takes for matrices .* learned ranges"):
        torch.optim.Muon(by_dimension, lr=1e-3, weight_decay=0).step()
