"""SelfDistillation against its definition on small models."""

import copy

import pytest
import torch
from compare import assert_bit_equal
from tiny_models import DECODERS, gpt2, prepared, tokens, transformers
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from torch.testing import assert_close

import asymq
from asymq import QuantConfig, QuantSpec
from asymq.quantizers import named_quantizers

LABELS = tokens().masked_fill(tokens() % 5 == 0, -100)


def student(make=gpt2, setting="beta_gamma") -> nn.Module:
    """Prepared and calibrated, with frozen weights and without dropout, in training mode."""
    model = prepared(make(), setting)
    asymq.freeze_weights(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def classifier() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def close(a, b, rtol=1e-4, atol=1e-6):
    assert_close(a, b, rtol=rtol, atol=atol)


def divergence(teacher, logits, temperature=1.0):
    """Of every position."""
    pair = (log_softmax(x.double() / temperature, -1) for x in (logits, teacher))
    return temperature**2 * kl_div(*pair, reduction="none", log_target=True).sum(-1)


def float_logits(make, **batch):
    with torch.no_grad():
        return make().eval()(**batch).logits


@pytest.mark.parametrize("make", [gpt2, DECODERS["llama"]])
def test_counted_positions_of_a_causal_model(make):
    model = student(make)
    mask = torch.ones_like(LABELS)
    mask[0, :3] = 0
    # A query that sees no key is nobody's business.
    labels = LABELS.clone()
    labels[0, :4] = -100
    batch = {"input_ids": tokens(), "attention_mask": mask}
    every = divergence(float_logits(make, **batch), model(**batch).logits, temperature=2.0)
    loss = asymq.SelfDistillation(model, temperature=2.0)
    kept = labels[:, 1:] != -100
    expected = every[:, :-1][kept].mean()
    close(loss(**batch, labels=labels).double(), expected)
    close(loss(**batch).double(), every[mask.bool()].mean())
    total = loss(**batch, labels=labels, num_items_in_batch=torch.tensor(7))
    close(total.double(), expected * kept.sum() / 7)
    del batch["attention_mask"]
    every = divergence(float_logits(make, **batch), model(**batch).logits, temperature=2.0)
    close(loss(**batch).double(), every.mean())


def test_other_models_count_labels_in_their_own_place():
    torch.manual_seed(0)
    model = classifier()
    before = copy.deepcopy(model).eval()
    asymq.prepare(model, QuantConfig.w8a8())
    asymq.calibrate(model, [tokens()])
    asymq.freeze_weights(model)
    model.eval()
    labels = torch.tensor([1, -100])
    expected = divergence(before(tokens()).logits, model(tokens()).logits)
    loss = asymq.SelfDistillation(model)
    close(loss(input_ids=tokens(), labels=labels).double(), expected[0])
    close(loss(input_ids=tokens()).double(), expected.mean())


def test_cross_entropy_is_the_model_s_own():
    model = student()
    batch = {"input_ids": tokens(), "labels": LABELS}
    own = model(**batch).loss
    alone = asymq.SelfDistillation(model)(**batch)
    both = asymq.SelfDistillation(model, cross_entropy=0.25)(**batch)
    close(both, alone + 0.25 * own)
    count = (LABELS[:, 1:] != -100).sum()
    both = asymq.SelfDistillation(model, cross_entropy=0.25)(**batch, num_items_in_batch=2 * count)
    close(both, (alone + 0.25 * own) / 2)


def test_gradients_are_those_of_the_composition():
    model = student()
    teacher = float_logits(gpt2, input_ids=tokens())
    ranges = [p for p in model.parameters() if p.requires_grad]
    loss = asymq.SelfDistillation(model)
    found = torch.autograd.grad(loss(input_ids=tokens()), ranges)
    logits = model(tokens()).logits
    expected = torch.autograd.grad(divergence(teacher, logits).mean(), ranges)
    for a, e in zip(found, expected, strict=True):
        close(a, e, rtol=1e-3, atol=1e-6)


def test_ranges_learn():
    model = student()
    loss = asymq.SelfDistillation(model)
    optimizer = torch.optim.Adam(asymq.range_parameters(model, 3e-3))
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        value = loss(input_ids=tokens())
        value.backward()
        optimizer.step()
        losses.append(value.item())
    # A mean: what one step moves over a transition is as large as what several have gained.
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0]


def test_the_model_is_left_as_it_was():
    """Its modes and the quantizers' states, one of which is off, also where a forward raises."""
    model = student()
    asymq.disable_quantizers(model.transformer.h[0].mlp)
    model.transformer.h[1].attn.eval()

    def state():
        modes = [m.training for m in model.modules()]
        return modes, [q.state for _, q in named_quantizers(model)]

    before = state()
    seen = []
    loss = asymq.SelfDistillation(model)
    handle = model.lm_head.register_forward_hook(lambda *_: seen.append(state()))
    loss(input_ids=tokens())
    assert state() == before
    assert not any(seen[0][0]) and set(seen[0][1]) == {"off"}
    assert seen[1] == before
    handle.remove()

    def fail(*_):
        raise RuntimeError("stop")

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        loss(input_ids=tokens())
    assert state() == before


def test_another_teacher():
    """Then weights may learn."""
    model = student().requires_grad_(True)
    teacher = gpt2(n_embd=16).train()
    expected = divergence(teacher.eval()(tokens()).logits, model(tokens()).logits).mean()
    teacher.train()
    for of in (teacher, lambda input_ids: teacher.eval()(input_ids).logits):
        loss = asymq.SelfDistillation(model, teacher=of)
        close(loss(input_ids=tokens()).double(), expected)
        teacher.train()
    loss = asymq.SelfDistillation(model, teacher=teacher)
    loss(input_ids=tokens()).backward()
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0


def test_hidden_outputs():
    model = student()
    outputs = {}
    kept = LABELS[:, 1:] != -100
    layers = [f"transformer.h.{i}" for i in range(2)]
    for name, of in (("float", gpt2()), ("quantized", model)):
        handles = [
            of.get_submodule(layer).register_forward_hook(
                lambda _, __, out, key=(name, layer): outputs.__setitem__(key, out)
            )
            for layer in layers
        ]
        of(tokens())
        for handle in handles:
            handle.remove()
    alone = asymq.SelfDistillation(model)(input_ids=tokens(), labels=LABELS)
    found = asymq.SelfDistillation(model, hidden=["transformer.h.?"])
    extra = found(input_ids=tokens(), labels=LABELS) - alone
    expected = 0
    for layer in layers:
        pair = [outputs[name, layer] for name in ("float", "quantized")]
        x, y = (out[0] if isinstance(out, tuple) else out for out in pair)
        expected = expected + (x - y).square().mean(-1)[:, :-1][kept].mean()
    close(extra, expected, rtol=1e-3, atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())


def test_adapters_are_off_in_the_teacher():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        student(DECODERS["llama"]),
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    expected = divergence(
        float_logits(DECODERS["llama"], input_ids=tokens()), model(input_ids=tokens()).logits
    )
    loss = asymq.SelfDistillation(model)(input_ids=tokens())
    close(loss.double(), expected.mean())
    loss.backward()
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)


def test_checkpointing_and_accumulation():
    def gradients(checkpointed: bool, parts: int):
        model = student()
        # Checkpointing goes without a cache, which lays keys out otherwise: products may differ.
        model.config.use_cache = False
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = asymq.SelfDistillation(model)
        for part in tokens().chunk(parts):
            loss(input_ids=part, num_items_in_batch=tokens().numel()).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    whole = gradients(False, 1)
    for a, e in zip(gradients(True, 1), whole, strict=True):
        assert_bit_equal(a, e)
    for a, e in zip(gradients(False, 2), whole, strict=True):
        close(a, e, rtol=1e-4, atol=1e-6)


def test_compiled():
    model = student(DECODERS["llama"], QuantConfig.w4a8(group=16))
    expected = asymq.SelfDistillation(model)(input_ids=tokens())
    compiled = torch.compile(model, backend="aot_eager")
    loss = asymq.SelfDistillation(compiled)(input_ids=tokens())
    close(loss, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"hidden needs .* before torch\.compile"):
        asymq.SelfDistillation(compiled, hidden=["*"])


def test_the_loss_of_a_trainer(tmp_path):
    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = asymq.SelfDistillation(model)
            return loss(**inputs, num_items_in_batch=num_items_in_batch)

    model = student()
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=3e-3, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
        weight_decay=0.0,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_errors():
    model = student()
    with pytest.raises(ValueError, match=r"cross_entropy needs labels"):
        asymq.SelfDistillation(model, cross_entropy=1.0)(input_ids=tokens())
    for options, message in (
        *(({"temperature": t}, "temperature must be a") for t in (0.0, float("nan"), True, "1")),
        *(({"cross_entropy": c}, "cross_entropy must be a") for c in (-1.0, float("inf"), True)),
        ({"hidden": ["nowhere.*"]}, r"hidden: no module is called 'nowhere\.\*'"),
        ({"hidden": ["*"], "teacher": lambda **_: None}, "hidden needs a teacher that is a module"),
    ):
        with pytest.raises(ValueError, match=f"asymq.SelfDistillation: {message}"):
            asymq.SelfDistillation(model, **options)
    with pytest.raises(ValueError, match="no quantizers: prepare it first"):
        asymq.SelfDistillation(gpt2())
    with pytest.raises(ValueError, match=r"shape \[2, 12, 96\], got \[2, 12, 50\]"):
        asymq.SelfDistillation(model, teacher=gpt2(vocab_size=50).float())(
            input_ids=tokens().remainder(50)
        )
    loss = asymq.SelfDistillation(model)
    model.transformer.wte.weight.requires_grad_()
    for call in (lambda: asymq.SelfDistillation(model), lambda: loss(input_ids=tokens())):
        with pytest.raises(
            ValueError, match=r"wte.weight learns.*freeze_weights\(model\).*teacher="
        ):
            call()


def test_without_a_quantizer_of_logits():
    model = gpt2()
    asymq.prepare(model, QuantConfig(QuantSpec(4, symmetric=True), head=None, embedding=None))
    asymq.calibrate(model, [tokens()])
    asymq.freeze_weights(model)
    expected = divergence(float_logits(gpt2, input_ids=tokens()), model(tokens()).logits).mean()
    close(asymq.SelfDistillation(model)(input_ids=tokens()).double(), expected)
