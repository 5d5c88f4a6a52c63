"""Logits of an odd vocabulary whose rows start aligned: the same in all but their strides."""

from __future__ import annotations

import io

import pytest
import torch
import transformers
from tiny_models import DECODERS, gpt2, prepared, tokens
from torch.testing import assert_close

import asymq
from asymq import QuantConfig
from asymq.layers import linear
from asymq.layers.loss import aligning

VOCABULARY = 97
MODELS = {
    "gpt2": lambda: gpt2(vocab_size=VOCABULARY),
    "llama": DECODERS["llama"],
    "llama-tied": DECODERS["llama-tied"],
}
CONFIGS = {"table2": QuantConfig.table2("beta_gamma"), "w4a8": QuantConfig.w4a8(group=16)}


@pytest.fixture
def aligned(monkeypatch):
    """Tiny products on the CPU as large ones on CUDA: whether they are aligned is what is set."""
    wanted = {"now": True}
    monkeypatch.setattr(linear, "is_large_on_cuda", lambda *_: wanted["now"])
    return wanted


def student(make, config):
    torch.manual_seed(0)
    model = prepared(make(), config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def is_aligned(logits) -> bool:
    return logits.stride(-1) == 1 and logits.stride(-2) == VOCABULARY + -VOCABULARY % 8


def step(model, **options):
    model.zero_grad()
    result = model(tokens(), labels=tokens(), **options)
    result.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return result, gradients


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_same(name, config, aligned):
    model = student(MODELS[name], CONFIGS[config])
    result, gradients = step(model)
    assert is_aligned(result.logits)
    aligned["now"] = False
    expected, of_expected = step(model)
    assert not is_aligned(expected.logits)
    assert result.logits.shape == expected.logits.shape
    assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert_close(result.loss, expected.loss)
    assert gradients.keys() == of_expected.keys()
    for key, gradient in gradients.items():
        assert gradient.shape == of_expected[key].shape
        assert_close(gradient, of_expected[key], rtol=1e-4, atol=1e-6, msg=key)


def test_a_loss_of_one_s_own(aligned):
    """Logits that are flattened, changed in place and used twice."""
    model = student(MODELS["gpt2"], CONFIGS["table2"])

    def gradients():
        model.zero_grad()
        logits = model(tokens()).logits
        logits /= 2.0
        flat = logits.view(-1, VOCABULARY)
        loss = torch.nn.functional.cross_entropy(flat, tokens().flatten())
        (loss + logits.square().mean()).backward()
        return [p.grad.clone() for p in model.parameters()]

    actual = gradients()
    aligned["now"] = False
    for a, e in zip(actual, gradients(), strict=True):
        assert_close(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_distillation_aligns_the_teacher_too(name, aligned):
    model = student(MODELS[name], CONFIGS["table2"])
    asymq.freeze_weights(model)
    strides = []
    model.lm_head.register_forward_hook(lambda _, __, logits: strides.append(is_aligned(logits)))

    def loss_and_gradients():
        model.zero_grad()
        loss = asymq.SelfDistillation(model)(input_ids=tokens())
        loss.backward()
        return loss, [p.grad for p in model.parameters() if p.requires_grad]

    loss, gradients = loss_and_gradients()
    assert strides == [True, True] and not aligning()
    aligned["now"] = False
    expected, of_expected = loss_and_gradients()
    assert_close(loss, expected)
    for a, e in zip(gradients, of_expected, strict=True):
        assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_where_a_column_more_would_be_seen(aligned):
    """A live range, gradients scaled by the number of elements, an observer, a hook, single
    operations, no graph: nothing is aligned."""
    of_tokens = asymq.QuantSpec(bits=8, granularity=asymq.PerToken(), dynamic=True)
    live = CONFIGS["table2"].replace(overrides={"lm_head.output_quantizer": of_tokens})
    assert not is_aligned(student(MODELS["gpt2"], live)(tokens()).logits)
    model = student(MODELS["gpt2"], CONFIGS["table2"])
    assert is_aligned(model(tokens()).logits)
    with asymq.use_functions("unfused"):
        assert not is_aligned(model(tokens()).logits)
    with torch.no_grad():
        assert not is_aligned(model(tokens()).logits)
    quantizer = model.lm_head.output_quantizer
    quantizer.spec = quantizer.spec.replace(gradient_scale="lsq")
    assert not is_aligned(model(tokens()).logits)
    quantizer.spec = quantizer.spec.replace(gradient_scale=None)
    quantizer.state = "observing"
    assert not is_aligned(model(tokens()).logits)
    quantizer.state = "quantizing"
    handle = quantizer.register_forward_hook(lambda *_: None)
    assert not is_aligned(model(tokens()).logits)
    handle.remove()
    assert is_aligned(model(tokens()).logits)


def test_logits_are_saved_and_generated_from(aligned):
    model = student(MODELS["llama"], CONFIGS["w4a8"])
    file = io.BytesIO()
    logits = model(tokens()).logits
    torch.save(logits, file)
    file.seek(0)
    assert torch.equal(torch.load(file), logits)
    model.eval()
    generated = model.generate(tokens(), max_new_tokens=4, do_sample=False)
    aligned["now"] = False
    assert torch.equal(generated, model.generate(tokens(), max_new_tokens=4, do_sample=False))


def test_compilers_align_by_themselves(aligned):
    model = student(MODELS["llama"], CONFIGS["table2"])
    aligned["now"] = False
    expected = model(tokens(), use_cache=False).logits
    aligned["now"] = True
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    exported = torch.export.export(model, (tokens(),), {"use_cache": False}).module()
    for program in (compiled, exported):
        logits = program(tokens(), use_cache=False).logits
        assert not is_aligned(logits)
        assert_close(logits, expected, rtol=5e-3, atol=5e-3)


def test_under_autocast(aligned):
    model = student(MODELS["gpt2"], CONFIGS["table2"])
    with torch.autocast("cpu", torch.bfloat16):
        result, gradients = step(model)
        assert is_aligned(result.logits) and result.logits.dtype == torch.bfloat16
        aligned["now"] = False
        expected, of_expected = step(model)
    assert_close(result.loss, expected.loss, rtol=1e-2, atol=1e-2)
    for key, gradient in gradients.items():
        assert gradient.dtype == of_expected[key].dtype


def test_evaluation_of_a_trainer(aligned, tmp_path):
    model = student(MODELS["llama"], CONFIGS["table2"])
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=True, weight_decay=0.0, learning_rate=1e-4,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_large_products_on_cuda(monkeypatch):
    """What is not set: a head that is large enough trains aligned, and computes the same."""
    config = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=2**14 + 1)
    model = prepared(transformers.GPT2LMHeadModel(config)).cuda()
    ids = tokens().cuda()
    result = model(ids, labels=ids)
    result.loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    assert result.logits.stride(-2) % 8 == 0 and result.logits.shape[-1] == 2**14 + 1
    monkeypatch.setattr(linear, "is_large_on_cuda", lambda *_: False)
    model.zero_grad()
    expected = model(ids, labels=ids)
    expected.loss.backward()
    assert_close(result.loss, expected.loss)
    assert_close(gradient, model.lm_head.weight.grad, rtol=1e-3, atol=1e-6)
