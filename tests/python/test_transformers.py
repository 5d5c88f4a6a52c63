"""transformers around a prepared model: save_pretrained, from_pretrained, Trainer, accelerate."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import assert_bit_equal
from tiny_models import (
    FAMILIES,
    gpt2,
    logits,
    next_token_loss,
    opt,
    prepared,
    tokens,
    train,
    transformers,
)
from torch import nn

import asymq
from asymq import PerChannel, QuantConfig, QuantSpec
from asymq.description import DESCRIPTION
from asymq.quantizers import named_quantizers

GENERIC = QuantConfig(
    QuantSpec(4, symmetric=True, granularity=PerChannel()), QuantSpec(8), QuantSpec(8)
)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny(family, cls, **options):
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    return getattr(transformers, cls)(config).eval()


def quantized(family, cls, config=GENERIC, **options):
    """Of any model of transformers, most of which are known by their layers alone."""
    model = tiny(family, cls, **options)
    asymq.prepare(model, config)
    asymq.calibrate(model, [tokens()])
    return model


def learned(build=gpt2):
    model = prepared(build())
    train(model, 2, 1e-3)
    return model.eval()


def assert_same_model(actual, expected):
    assert type(actual) is type(expected) and not actual.training
    state = expected.state_dict()
    assert list(actual.state_dict()) == list(state)
    for name, value in actual.state_dict().items():
        assert_bit_equal(value, state[name])
    names = [name for name, p in expected.named_parameters() if p.requires_grad]
    assert [name for name, p in actual.named_parameters() if p.requires_grad] == names
    with torch.no_grad():
        assert_bit_equal(*(m(tokens(), return_dict=False)[0] for m in (actual, expected)))


def in_new_process(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


# ---- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_returns_the_prepared_model(family, tmp_path):
    model = learned(FAMILIES[family])
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(again, model)
    assert again.generation_config.max_new_tokens == 7
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert head.weight_quantizer is embedding.weight_quantizer
    # Nothing sets it apart from one that was prepared here: it casts, learns, is saved, converts.
    train(again.float(), 1, 1e-3)
    again.save_pretrained(tmp_path / "again")
    assert_same_model(type(FAMILIES[family]()).from_pretrained(tmp_path / "again"), again.eval())
    asymq.convert(again)
    again.save_pretrained(tmp_path / "float")
    assert not (tmp_path / "float" / DESCRIPTION).exists()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert not any(named_quantizers(plain))
    assert_bit_equal(logits(plain, tokens()), logits(again, tokens()))


KINDS = {
    "llama": lambda: quantized("Llama", "LlamaForCausalLM", num_key_value_heads=2),
    "tied": lambda: quantized("Llama", "LlamaForCausalLM", tie_word_embeddings=True),
    "inputs": lambda: quantized(
        "Llama", "LlamaForCausalLM", QuantConfig.w4a8(group=16), tie_word_embeddings=True
    ),
    "mixture": lambda: quantized(
        "Mixtral", "MixtralForCausalLM", num_local_experts=4, num_key_value_heads=2
    ),
    "encoder": lambda: quantized("Bert", "BertModel"),
    "masked": lambda: quantized("Bert", "BertForMaskedLM"),
    "classifier": lambda: quantized("Llama", "LlamaForSequenceClassification", num_labels=3),
}


@pytest.mark.filterwarnings("ignore:asymq")
@pytest.mark.parametrize("kind", KINDS)
def test_any_model_in_several_files(kind, tmp_path):
    model = KINDS[kind]()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    cls = getattr(transformers, type(model).__name__)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r"asymq\.prepare")  # which has said it all
        opened = cls.from_pretrained(tmp_path), asymq.load(tmp_path)
    for again in opened:
        assert_same_model(again, model)


def test_dtypes_and_devices(tmp_path):
    model = learned()
    model.save_pretrained(tmp_path)
    cls = transformers.AutoModelForCausalLM
    for device_map in ("cpu", "auto"):
        assert_same_model(cls.from_pretrained(tmp_path, device_map=device_map).cpu(), model)
    assert_same_model(cls.from_pretrained(tmp_path, dtype=torch.bfloat16), model.bfloat16())
    model.save_pretrained(tmp_path / "bfloat16")
    assert_same_model(cls.from_pretrained(tmp_path / "bfloat16"), model)


def test_a_model_within_another(tmp_path):
    """The outer one is no model of transformers; the inner one saves what is its own."""
    outer = nn.Sequential(gpt2())
    asymq.prepare(outer, QuantConfig.table2("min_max"))
    asymq.calibrate(outer, [tokens()])
    outer[0].save_pretrained(tmp_path)
    assert not hasattr(outer, "save_pretrained")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_bit_equal(logits(again, tokens()), logits(outer[0], tokens()))


def test_an_uncalibrated_model(tmp_path):
    asymq.prepare(gpt2(), QuantConfig.table2("min_max")).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="calibrate"):
        again(tokens())
    asymq.calibrate(again, [tokens()])
    assert logits(again, tokens()).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["asymq, transformers", "transformers, asymq"])
def test_imports_in_either_order(order, tmp_path):
    """Without a prepared model in that process; importing asymq alone does not wait for it."""
    model = learned()
    model.save_pretrained(tmp_path)
    torch.save(logits(model, tokens()), tmp_path / "expected.pt")
    first, second = order.split(", ")
    in_new_process(
        f"import sys, torch, {first}\n"
        f"assert '{second}' not in sys.modules\n"
        f"from transformers import AutoModelForCausalLM\n"
        f"import {second}\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "ids = torch.tensor(eval(sys.argv[2]))\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(ids).logits, expected)\n",
        tmp_path,
        tokens().tolist(),
    )


@pytest.mark.slow
def test_without_asymq_transformers_names_it(tmp_path):
    """Its warning, the names it does not know, and a note in config.json."""
    prepared(gpt2()).save_pretrained(tmp_path)
    note = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert note["quant_method"] == "asymq" and "import asymq before from_pretrained" in note["note"]
    output = in_new_process(
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'asymq' not in sys.modules\n"
        "assert not any('quantizer' in name for name, _ in model.named_modules())\n"
        "model.save_pretrained(sys.argv[1] + '/float')\n",
        tmp_path,
    )
    assert "Unknown quantization type, got asymq" in output
    assert "lm_head.output_quantizer" in output
    # What it writes still names asymq, and has no quantizers.
    with pytest.raises(ValueError, match=r"float has no asymq\.json.*delete quantization_config"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")


def test_a_repository_has_the_description_downloaded(tmp_path, monkeypatch):
    """from_pretrained takes the files that transformers knows."""
    model = learned()
    model.save_pretrained(tmp_path / "cache")
    elsewhere = (tmp_path / "cache" / DESCRIPTION).rename(tmp_path / DESCRIPTION)
    asked = []

    def cached_file(repository, name, **options):
        asked.append((repository, name))
        return str(elsewhere)

    monkeypatch.setattr("asymq.integrations.transformers.cached_file", cached_file)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cache")
    assert_same_model(again, model)
    assert asked == [(str(tmp_path / "cache"), DESCRIPTION)]


# ---- what is refused -----------------------------------------------------------------------------


def test_folders_that_do_not_fit(tmp_path):
    model = prepared(gpt2())
    model.save_pretrained(tmp_path)
    fit = "asymq: from_pretrained: .* holds a GPT2LMHeadModel, which this GPT2Model does not fit"
    with pytest.raises(ValueError, match=fit):
        transformers.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs the folder that save_pretrained wrote"):
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        state = model.state_dict()
        type(gpt2()).from_pretrained(None, config=config, state_dict=state)
    with pytest.raises(ValueError, match=r"leaves a part of the model .* on disk"):
        type(gpt2()).from_pretrained(tmp_path, device_map={"transformer": 0, "lm_head": "disk"})
    path = tmp_path / DESCRIPTION
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match=r"asymq: from_pretrained: .*asymq\.json has the format 9"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_from_pretrained_does_not_quantize(tmp_path):
    from asymq.integrations.transformers import AsymqConfig

    gpt2().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not quantize: call asymq\.prepare"):
        type(gpt2()).from_pretrained(tmp_path, quantization_config=AsymqConfig())


def test_what_save_pretrained_refuses(tmp_path):
    model = prepared(gpt2())
    with pytest.raises(ValueError, match="no quantizers from a distributed checkpoint"):
        model.save_pretrained(tmp_path / "a", distributed_checkpoint=True)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="hqq"))
    with pytest.raises(ValueError, match=r"has that of hqq, too: write it with asymq\.save"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# ---- Trainer -------------------------------------------------------------------------------------


def trainer(model, folder, cls=None, **arguments):
    pytest.importorskip("accelerate")
    options = {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-3, **arguments}
    options = transformers.TrainingArguments(
        output_dir=str(folder), report_to=[], disable_tqdm=True, use_cpu=True, **options
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(4, 12)]
    return (cls or transformers.Trainer)(model=model, args=options, train_dataset=data)


def test_trainer_takes_and_saves_it(tmp_path):
    learned().save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    run = trainer(model, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "trained"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert_same_model(again, model.eval())


def losses_of(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_a_trainer_resumes(tmp_path):
    """With the optimizer and the ranges of the one that went on, from its checkpoint alone."""

    def run(model, folder, **more):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        saves = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "max_steps": 4}
        return trainer(model, folder, **saves, lr_scheduler_type="constant", **more)

    whole = run(prepared(gpt2()), tmp_path)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    fresh = asymq.prepare(gpt2(), QuantConfig.table2("beta_gamma"))
    resumed = run(fresh, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses_of(resumed)[-2:] == losses_of(whole)[-2:]
    assert_same_model(resumed.model.eval(), whole.model.eval())
    # The checkpoint is a folder for from_pretrained, too, without the optimizer.
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    other = run(model, tmp_path / "other")
    other.train()
    assert losses_of(other)[0] == pytest.approx(losses_of(whole)[2], rel=1e-5)
    assert losses_of(other)[1] != pytest.approx(losses_of(whole)[3], rel=1e-4)


def mixin(rate=None):
    from asymq.integrations.transformers import RangeTrainerMixin

    class QuantTrainer(RangeTrainerMixin, transformers.Trainer):
        range_lr = rate

    return QuantTrainer


def test_a_trainer_refuses_a_rate_that_cannot_be(tmp_path):
    run = trainer(prepared(gpt2()), tmp_path, mixin(-1.0))
    with pytest.raises(ValueError, match="QuantTrainer: range_lr must be a finite number of at"):
        run.train()


@pytest.mark.filterwarnings("error:asymq")
@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_a_trainer_that_decays_no_range(optimizer, tmp_path):
    model = prepared(gpt2())
    run = trainer(model, tmp_path, mixin(), optim=optimizer, weight_decay=0.1)
    run.train()
    ranges = {id(p) for group in asymq.range_parameters(model) for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups(run) for p in group["params"]}
    assert ranges <= decay.keys() and len(decay) == len(list(model.parameters()))
    assert not any(decay[p] for p in ranges)
    assert decay[id(model.transformer.h[0].mlp.c_fc.weight)] == 0.1


def groups(run):
    return run.optimizer.param_groups


@pytest.mark.parametrize("frozen", [False, True])
def test_ranges_with_a_rate_of_their_own(frozen, tmp_path):
    model = prepared(gpt2())
    if frozen:
        asymq.freeze_weights(model)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    run = trainer(model, tmp_path, mixin(0.25), weight_decay=0.1, lr_scheduler_type="linear")
    run.train()
    ranges = {id(p) for group in asymq.range_parameters(model) for p in group["params"]}
    parameters = []
    for group in groups(run):
        inside = {id(p) in ranges for p in group["params"]}
        assert len(inside) <= 1
        if inside == {True}:
            assert group["initial_lr"] == 0.25 and group["weight_decay"] == 0
            assert max((p - before[id(p)]).abs().max() for p in group["params"]) > 0.2
        else:
            assert group["initial_lr"] == 1e-3
        assert group["lr"] == 0  # the schedule is one
        parameters += group["params"]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, parameters)) == sorted(map(id, trained))


def test_the_mixin_leaves_a_given_optimizer(tmp_path):
    model = prepared(gpt2())
    run = trainer(model, tmp_path, mixin(0.25))
    run.optimizer = torch.optim.SGD(asymq.range_parameters(model), lr=1e-3)
    run.train()
    assert len(groups(run)) == 1


# ---- accelerate ----------------------------------------------------------------------------------


def test_accelerate_resumes(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def start(model):
        accelerator = accelerate.Accelerator(cpu=True)
        weights = {"params": asymq.weight_parameters(model), "weight_decay": 0.1}
        groups = [weights, *asymq.range_parameters(model, lr=1e-2)]
        return accelerator, *accelerator.prepare(model, torch.optim.AdamW(groups, lr=1e-3))

    def losses(accelerator, model, optimizer):
        result = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = next_token_loss(model, tokens())
            accelerator.backward(loss)
            optimizer.step()
            result.append(loss.item())
        return result

    first = start(prepared(opt()))
    losses(*first)
    first[0].save_state(str(tmp_path))
    expected = losses(*first)
    second = start(asymq.prepare(opt(), QuantConfig.table2("beta_gamma")))
    second[0].load_state(str(tmp_path))
    assert losses(*second) == expected
