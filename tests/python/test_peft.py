"""Adapters, before and after prepare: they stay float, and the base keeps its quantizers."""

import re
import warnings

import pytest
import torch
from compare import assert_bit_equal
from tiny_models import gpt2, logits, next_token_loss, opt, prepared, tokens, transformers
from torch import nn

import asymq
from asymq import QuantConfig, QuantSpec
from asymq.quantizers import named_quantizers

peft = pytest.importorskip("peft")

# A family, and the layers that get adapters: Conv1D of GPT-2, Linear of OPT.
BASES = {"gpt2": (gpt2, ["c_fc", "c_attn"]), "opt": (opt, ["q_proj", "fc1"])}
TABLE2 = QuantConfig.table2("min_max")


def adapt(model, *targets, config=peft.LoraConfig, **options):
    if config is peft.LoraConfig:
        options = {"r": 2, "init_lora_weights": False, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # of Conv1D
        return peft.get_peft_model(model, config(target_modules=list(targets), **options)).eval()


def names_of(model):
    """Of quantizers, without what an adapter adds to them."""
    names = [name for name, _ in named_quantizers(model)]
    return sorted(re.sub(r"^base_model\.model\.|\.base_layer", "", n) for n in names)


def assert_float_adapters(model):
    layers = [m for name, m in model.named_modules() if name.endswith(("lora_A.x", "lora_B.x"))]
    layers += [m for name, m in model.named_modules() if ".lora_" in f".{name}"]
    assert layers and not any(isinstance(m, asymq.layers.Quantized) for m in layers)
    assert not any("lora_" in name for name, _ in named_quantizers(model))


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


# ---- before and after prepare --------------------------------------------------------------------


@pytest.mark.filterwarnings("error:asymq")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_adapters_on_a_prepared_model(base, dora):
    """They find the layers and learn; the layers go on quantizing."""
    build, targets = BASES[base]
    model = prepared(build())
    names, before = names_of(model), logits(model, tokens())
    adapted = adapt(model, *targets, use_dora=dora)
    assert names_of(adapted) == names
    assert_float_adapters(adapted)
    assert not torch.equal(logits(adapted, tokens()), before)
    with adapted.disable_adapter():
        assert_bit_equal(logits(adapted, tokens()), before)
    next_token_loss(adapted, tokens()).backward()
    assert trained(adapted) and all("lora_" in name for name in trained(adapted))
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    # What does nothing yet changes nothing: DoRA's norms are those of the weight itself.
    fresh = adapt(prepared(build()), *targets, use_dora=dora, init_lora_weights=True)
    torch.testing.assert_close(logits(fresh, tokens()), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_prepare_after_adapters(base, whole):
    """The adapter goes on; the base's weight and the adapter's output are quantized."""
    build, targets = BASES[base]
    adapted = adapt(build(), *targets)
    adapted.base_model.model.set_attn_implementation("eager")
    model = adapted if whole else adapted.base_model.model
    expected = logits(model, tokens())
    asymq.prepare(model, TABLE2)
    assert_float_adapters(model)
    assert names_of(model) == names_of(prepared(build(), TABLE2))
    names = [name for name, _ in named_quantizers(model)]
    assert sum(name.endswith(f"{targets[0]}.output_quantizer") for name in names) == 2
    assert sum(name.endswith("base_layer.weight_quantizer") for name in names) == 4
    asymq.calibrate(model, [tokens()])
    asymq.disable_quantizers(model)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_merging_keeps_the_quantizers(base, after, weights):
    """Those of outputs, too, that are the adapters' own where they were there first."""
    build, targets = BASES[base]
    config = TABLE2 if weights else TABLE2.replace(weight=None)
    if after:
        adapted = adapt(build(), *targets)
        asymq.calibrate(asymq.prepare(adapted, config), [tokens()])
    else:
        adapted = adapt(prepared(build(), config), *targets)
    names = names_of(adapted)
    merged = adapted.merge_and_unload()
    assert names_of(merged) == names and not any("base" in n for n, _ in named_quantizers(merged))
    own = merged.get_submodule(
        "transformer.h.0.mlp.c_fc" if base == "gpt2" else "model.decoder.layers.0.self_attn.q_proj"
    )
    calls = []
    own.output_quantizer.register_forward_hook(lambda *_: calls.append(1))
    result = logits(merged, tokens())
    assert len(calls) == 1 and result.isfinite().all()
    asymq.convert(merged)
    float_model = build()
    assert [type(m) for m in merged.modules()] == [type(m) for m in float_model.modules()]


def test_a_merged_model_computes_with_the_merged_weight():
    """Of 16 bits, so that it is seen."""
    fine = QuantSpec(16, symmetric=True, granularity=asymq.PerChannel())
    for after in (True, False):
        torch.manual_seed(1)
        float_model = adapt(opt(), "fc1")
        expected = logits(float_model.merge_and_unload(), tokens())
        torch.manual_seed(1)
        if after:
            adapted = adapt(opt(), "fc1")
            asymq.prepare(adapted, QuantConfig(fine, None, None))
        else:
            adapted = adapt(asymq.prepare(opt(), QuantConfig(fine, None, None)), "fc1")
        merged = adapted.merge_and_unload()
        asymq.calibrate(merged, [tokens()])
        torch.testing.assert_close(logits(merged, tokens()), expected, rtol=1e-2, atol=1e-2)


def test_embeddings_and_heads():
    model = prepared(opt())
    before = logits(model, tokens())
    adapted = adapt(model, "embed_tokens", "fc1")
    assert_float_adapters(adapted)
    next_token_loss(adapted, tokens()).backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    with adapted.disable_adapter():
        assert_bit_equal(logits(adapted, tokens()), before)
    # Prepared afterwards, merged rows are on their weight's grid: no quantizer of an output.
    adapted = adapt(opt(), "embed_tokens")
    asymq.calibrate(asymq.prepare(adapted, TABLE2), [tokens()])
    merged = adapted.merge_and_unload()
    assert merged.get_input_embeddings().output_quantizer is None
    assert logits(merged, tokens()).isfinite().all()


# ---- what others write ---------------------------------------------------------------------------


class Hand(nn.Module):
    """LoRA as written by hand."""

    def __init__(self, size):
        super().__init__()
        self.layer = nn.Linear(size, size)
        self.lora_a, self.lora_b = nn.Linear(size, 2, bias=False), nn.Linear(2, size, bias=False)

    def forward(self, x):
        return self.layer(x) + self.lora_b(self.lora_a(x))


def test_adapters_by_hand_stay_float():
    model = nn.Sequential(Hand(4), Hand(4))
    asymq.prepare(model, TABLE2)
    assert_float_adapters(model)
    assert type(model[0].lora_a) is nn.Linear
    assert isinstance(model[0].layer, asymq.QuantLinear)


@pytest.mark.filterwarnings("error:asymq")
def test_prompts_stay_float():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(gpt2(), config)
    asymq.calibrate(asymq.prepare(adapted, TABLE2), [tokens()])
    assert type(adapted.prompt_encoder["default"].embedding) is nn.Embedding
    names = [name.removeprefix("base_model.") for name in names_of(adapted)]
    assert names == names_of(prepared(gpt2(), TABLE2))


def test_adapters_that_pass_by_a_layer_are_named():
    """HRA multiplies with a weight that it makes of the layer's: nothing there is quantized."""
    adapted = adapt(prepared(opt()), "fc1", config=peft.HRAConfig)
    unused = r"with the adapters default did not use .*layers\.0\.fc1\.base_layer\.weight_quantizer"
    with pytest.warns(UserWarning, match=unused):
        logits(adapted, tokens())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="asymq")
        logits(adapted, tokens())  # once
        merged = adapted.unload()
        logits(merged, tokens())


# ---- files ---------------------------------------------------------------------------------------


def test_adapters_of_a_folder_with_quantizers(tmp_path):
    """Both from their folders: the base as prepared, then the adapters."""
    prepared(gpt2()).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = adapt(base, "c_fc")
    expected = logits(adapted, tokens())
    adapted.save_pretrained(tmp_path / "adapters")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapters")
    assert_bit_equal(logits(again, tokens()), expected)
    # transformers' own way, which knows the base by the adapters' folder.
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapters")
    assert_bit_equal(logits(own, tokens()), expected)


def test_a_base_with_adapters_in_it_is_not_saved_as_one_without(tmp_path):
    adapted = adapt(prepared(gpt2()), "c_fc")
    with pytest.raises(ValueError, match=r"has adapters of peft: .*merge_and_unload.*asymq\.save"):
        adapted.get_base_model().save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    asymq.save(adapted, tmp_path)
    again = asymq.load(tmp_path, adapt(prepared(gpt2()), "c_fc"))
    assert_bit_equal(logits(again, tokens()), logits(adapted, tokens()))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert names_of(merged) == names_of(prepared(gpt2()))


def test_ranges_learn_along_with_adapters(tmp_path):
    """get_peft_model freezes them; asymq.save has all of it."""
    adapted = adapt(prepared(gpt2()), "c_fc")
    (ranges,) = asymq.range_parameters(adapted, lr=1e-2)
    adapters = [p for p in adapted.parameters() if p.requires_grad]
    assert not {id(p) for p in adapters} & {id(p) for p in ranges["params"]}
    for parameter in ranges["params"]:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW([{"params": adapters}, ranges], lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(next_token_loss(adapted, tokens()))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    asymq.save(adapted, tmp_path)
    again = asymq.load(tmp_path, adapt(prepared(gpt2()), "c_fc"))
    assert_bit_equal(logits(again, tokens()), logits(adapted, tokens()))
