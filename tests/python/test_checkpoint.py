"""State: state_dict, copies, files, and what does not fit."""

import copy
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compare import assert_bit_equal
from safetensors import safe_open
from tiny_models import COPIES, FAMILIES, SETTINGS, gpt2, logits, opt, prepared, tokens, train
from torch import nn

import asymq
from asymq import QuantConfig, QuantSpec
from asymq.checkpoint import DESCRIPTION, WEIGHTS

TABLE2 = QuantConfig.table2("beta_gamma")
HERE = Path(__file__).parent


def learned(family="gpt2", setting="beta_gamma"):
    """A model whose ranges differ from their first values."""
    model = prepared(FAMILIES[family](), setting)
    train(model, 2, 1e-3)
    return model.eval()


def assert_same_state(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert_bit_equal(actual[name], value)


def in_new_process(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert result.returncode == 0, result.stderr


# ---- state_dict --------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_restores_an_uncalibrated_model(family, setting, device):
    model = learned(family, setting)
    state = model.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    fresh = asymq.prepare(FAMILIES[family](), QuantConfig.table2(setting)).to(device)
    fresh.load_state_dict(state)
    assert_same_state(fresh, model)
    assert_bit_equal(logits(fresh.cpu(), tokens()), logits(model, tokens()))
    for (name, a), (_, b) in zip(
        asymq.named_quantizers(fresh), asymq.named_quantizers(model), strict=True
    ):
        assert a.calibrated and a.state == "quantizing"
        for parameter in a.learned:  # what the step rules need
            assert_bit_equal(getattr(a, f"initial_{parameter}"), getattr(b, f"initial_{parameter}"))
        assert name == a.name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_checkpoint_loads(family):
    """Missing ranges are no error, missing or unexpected weights are."""
    other = (
        FAMILIES[family](initializer_range=0.3)
        if family == "gpt2"
        else FAMILIES[family](init_std=0.3)
    )
    state = other.state_dict()
    model = prepared(FAMILIES[family]())
    ranges = {n: v.clone() for n, v in model.state_dict().items() if "quantizer" in n}
    result = model.load_state_dict(state, strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    for name, value in model.state_dict().items():
        assert_bit_equal(value, ranges[name] if name in ranges else state[name])

    name = next(name for name in state if name.endswith("fc2.bias") or "c_fc.bias" in name)
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        model.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"h\.bias"'):
        model.load_state_dict({**state, "h.bias": state[name]})


@pytest.mark.parametrize("uncalibrated", [False, True])
def test_an_uncalibrated_state(uncalibrated):
    state = asymq.prepare(gpt2(), TABLE2).state_dict()
    model = asymq.prepare(gpt2(), TABLE2) if uncalibrated else prepared(gpt2())
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="calibrate"):
        model(tokens())


OTHERS = {
    "bits": QuantConfig(TABLE2.weight, QuantSpec(bits=8), TABLE2.norm_weight),
    "parameterization": QuantConfig.table2("min_max"),
    "sigmoid": QuantConfig.table2("beta_gamma_sigmoid"),
    "granularity": QuantConfig(
        QuantSpec(bits=4, symmetric=True), TABLE2.activation, TABLE2.norm_weight
    ),
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("what", OTHERS)
def test_a_state_of_another_config_changes_nothing(what, calibrated):
    state = prepared(gpt2(n_inner=64), OTHERS[what]).state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.add_(1)
    model = asymq.prepare(gpt2(n_inner=64), TABLE2)
    if calibrated:
        asymq.calibrate(model, [tokens()])
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"transformer\.\S+_quantizer: the state is of another"):
        model.load_state_dict(state)
    assert_same_state(model, before)
    # A copy has the check, too, and the copy is what it checks.
    with pytest.raises(RuntimeError, match="of another quantizer"):
        before.load_state_dict(state)


def test_a_state_that_lacks_a_part():
    model, state = prepared(gpt2()), prepared(gpt2()).state_dict()
    name = "transformer.h.1.mlp_sum_quantizer"
    for part in ("gamma", "initial_beta", "max"):
        broken = {k: v for k, v in state.items() if k != f"{name}.{part}"}
        with pytest.raises(RuntimeError, match=f"{name}: the state does not fit"):
            model.load_state_dict(broken)
    broken = {k: v for k, v in state.items() if k != f"{name}._extra_state"}
    with pytest.raises(RuntimeError, match=f"{name}: the state is of another config"):
        model.load_state_dict(broken)
    with pytest.raises(RuntimeError, match=f"{name}: the state does not fit.*of shapes"):
        model.load_state_dict({**state, f"{name}.gamma": torch.ones(3)})


@pytest.mark.parametrize("more, fewer", [("state", "model"), ("model", "state")])
def test_a_state_with_other_quantizers_changes_nothing(more, fewer):
    """One of the two lacks the quantizers of activations."""
    config = asymq.QuantConfig.table2("min_max")
    weights = replace(config, activation=None)
    models = {more: prepared(gpt2(), config), fewer: prepared(gpt2(), weights)}
    model, state = models["model"], models["state"].state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in state.values():
            tensor.add_(1)
    with pytest.raises(RuntimeError, match=r"output_quantizer|sum_quantizer|attn\..*_quantizer"):
        model.load_state_dict(state)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_generation_settings_are_saved(tmp_path):
    model = prepared(gpt2())
    model.generation_config.max_new_tokens = 7
    asymq.save(model, tmp_path)
    assert asymq.load(tmp_path).generation_config.max_new_tokens == 7


def test_load_into_layers_that_have_quantizers(tmp_path):
    def build():
        torch.manual_seed(3)
        output = asymq.QuantSpec(parameterization="min_max")
        return torch.nn.Sequential(asymq.QuantLinear(4, 3, output=output))

    x = torch.randn(5, 4)
    model = build()
    asymq.calibrate(model, [x])
    asymq.save(model, tmp_path)
    assert torch.equal(asymq.load(tmp_path, build())(x), model(x))


def test_an_unknown_format_is_refused(tmp_path):
    asymq.save(prepared(gpt2()), tmp_path)
    path = tmp_path / "asymq.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99"):
        asymq.load(tmp_path)


# ---- copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_copies(family, how):
    model = learned(family)
    expected = logits(model, tokens())
    twin = COPIES[how](model)
    assert_bit_equal(logits(twin, tokens()), expected)
    assert_same_state(twin, model)

    # The twin is a model of its own: it shares within itself alone, learns, and converts.
    embedding = twin.get_input_embeddings()
    assert twin.get_output_embeddings().weight is embedding.weight
    assert embedding.weight_quantizer is not model.get_input_embeddings().weight_quantizer
    calls = []
    embedding.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    logits(twin, tokens())
    assert len(calls) == 2
    train(twin, 1, 1e-2)
    assert not torch.equal(logits(twin, tokens()), expected)
    assert_bit_equal(logits(model, tokens()), expected)
    asymq.convert(twin)
    assert type(twin) is type(FAMILIES[family]())
    assert_bit_equal(logits(model, tokens()), expected)
    assert type(model) is not type(twin)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickled_model_runs_in_a_new_process(family, tmp_path):
    model = learned(family)
    torch.save((model, tokens(), logits(model, tokens())), tmp_path / "model.pt")
    in_new_process(
        "import sys, torch\n"
        "model, batch, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(batch).logits, expected)\n",
        tmp_path / "model.pt",
    )


# ---- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_in_a_new_process(family, tmp_path):
    model = learned(family, "beta_gamma_sigmoid")
    asymq.save(model, tmp_path / "new" / "folder")
    torch.save({"x": tokens(), "y": logits(model, tokens())}, tmp_path / "expected.pt")
    in_new_process(
        "import sys, torch, asymq\n"
        "model = asymq.load(sys.argv[1])\n"
        "assert not model.training\n"
        "expected = torch.load(sys.argv[2])\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(expected['x']).logits, expected['y'])\n",
        tmp_path / "new" / "folder",
        tmp_path / "expected.pt",
    )


VARIANTS = {
    "gpt2": lambda: prepared(gpt2()),
    "gpt2-untied": lambda: prepared(gpt2(tie_word_embeddings=False)),
    "opt-post-norm": lambda: prepared(opt(do_layer_norm_before=False, word_embed_proj_dim=16)),
    "bfloat16": lambda: prepared(gpt2()).bfloat16(),
    "uncalibrated": lambda: asymq.prepare(opt(), TABLE2),
    "dynamic": lambda: prepared(
        gpt2(), QuantConfig(None, QuantSpec(dynamic=True), None), allow_lookahead=True
    ),
    "overrides": lambda: prepared(
        gpt2(),
        QuantConfig(
            None,
            QuantSpec(),
            None,
            overrides={"*.h.1.*": None, "*.wte.*": QuantSpec(symmetric=True)},
            skip=("lm_head*",),
        ),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant, tmp_path):
    model = VARIANTS[variant]()
    asymq.save(model, tmp_path)
    again = asymq.load(tmp_path)
    assert type(again) is type(model)
    assert_same_state(again, model)
    assert [n for n, _ in asymq.named_quantizers(again)] == [
        n for n, _ in asymq.named_quantizers(model)
    ]
    if variant != "uncalibrated":
        assert_bit_equal(logits(again, tokens()), logits(model, tokens()))


def test_save_and_load_another_model(tmp_path):
    def float_model():
        return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LayerNorm(3))

    model = asymq.prepare(float_model(), TABLE2)
    x = torch.randn(5, 4)
    asymq.calibrate(model, [x])
    asymq.save(model, tmp_path)
    with pytest.raises(ValueError, match="Sequential is not a model of transformers: pass a float"):
        asymq.load(tmp_path)
    assert_bit_equal(asymq.load(tmp_path, float_model())(x), model(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_are_stored_once(family, tmp_path):
    model = prepared(FAMILIES[family]())
    asymq.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([WEIGHTS, DESCRIPTION])
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        stored = set(file.keys())
        shape = tuple(model.get_input_embeddings().weight.shape)
        assert sum(tuple(file.get_slice(key).get_shape()) == shape for key in stored) == 1
    assert set(model.state_dict()) - stored == {"lm_head.weight"} or (
        len(set(model.state_dict()) - stored) == 1
    )
    again = asymq.load(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    names = [name for name, _ in again.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]


def test_saving_again_replaces(tmp_path):
    model = prepared(gpt2())
    asymq.save(model, tmp_path)
    train(model, 1, 1e-2)
    asymq.save(model, str(tmp_path))
    assert_same_state(asymq.load(str(tmp_path)), model)
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_what_has_no_quantizers(tmp_path):
    with pytest.raises(ValueError, match=r"asymq\.save: the model has no quantizers"):
        asymq.save(gpt2(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = prepared(gpt2())
    asymq.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("asymq.checkpoint.save_file", full)
    train(model, 1, 1e-2)
    with pytest.raises(OSError, match="No space left"):
        asymq.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def _cut(name):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def _without(name):
    return lambda folder: (folder / name).unlink()


def _json(change):
    def damage(folder):
        values = json.loads((folder / DESCRIPTION).read_text())
        change(values)
        (folder / DESCRIPTION).write_text(json.dumps(values))

    return damage


DAMAGES = {
    "no description": (_without(DESCRIPTION), "holds no model saved by asymq"),
    "no weights": (_without(WEIGHTS), f"{WEIGHTS} does not load"),
    "cut description": (_cut(DESCRIPTION), "holds no model saved by asymq"),
    "cut weights": (_cut(WEIGHTS), f"{WEIGHTS} does not load"),
    "no quantizers": (_json(lambda v: v.pop("quantizers")), "holds no model saved by asymq"),
    "another file": (
        lambda folder: (folder / DESCRIPTION).write_text("[]"),
        "holds no model saved by asymq",
    ),
    "impossible spec": (
        _json(lambda v: v["quantizers"]["lm_head.output_quantizer"].update(bits=40)),
        "bits must be an integer from 2 to 16, got 40",
    ),
    "unknown quantizer": (
        _json(lambda v: v["quantizers"].update(head=v["quantizers"]["lm_head.output_quantizer"])),
        "no quantizer of GPT2LMHeadModel is called head",
    ),
    "another spec": (
        _json(lambda v: v["quantizers"]["lm_head.output_quantizer"].update(bits=4)),
        f"{WEIGHTS} does not load: .*lm_head.output_quantizer: the state is of another",
    ),
    "another class": (_json(lambda v: v.update({"class": "Nothing"})), "Nothing is not a model"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_folder(what, tmp_path):
    asymq.save(prepared(gpt2()), tmp_path)
    damage, message = DAMAGES[what]
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        asymq.load(tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"asymq\.load: .*nowhere holds no model saved by asymq"):
        asymq.load(tmp_path / "nowhere")


# ---- what varies per tensor, and what a killed process leaves ------------------------------------


@pytest.mark.parametrize("which", ["norms", "head"])
def test_every_tensor_keeps_its_dtype(which, tmp_path):
    model = prepared(gpt2(tie_word_embeddings=False)).bfloat16()
    for name, module in model.named_modules():
        if ("ln_" in name if which == "norms" else name == "lm_head") and "quant" not in name:
            module.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) / 3)
    asymq.save(model, tmp_path)
    again = asymq.load(tmp_path)
    assert len({p.dtype for n, p in again.named_parameters() if "quant" not in n}) == 2
    assert_same_state(again, model)


def test_what_a_killed_save_left_goes_with_the_next(tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    names = [".saving-abc", ".saving-999999999-abc", f".saving-{process.pid}-abc"]
    try:
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / WEIGHTS).write_bytes(b"half")
        asymq.save(prepared(gpt2()), tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {WEIGHTS, DESCRIPTION, names[2]}  # that one is still saving
    finally:
        process.kill()
        process.wait()


def test_messages_of_load_name_what_is_needed(tmp_path):
    asymq.save(prepared(gpt2()), tmp_path)
    path = tmp_path / DESCRIPTION
    saved = path.read_text()
    path.write_text(saved.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"asymq\.json has the format 2, this version .* reads 1"):
        asymq.load(tmp_path)
    path.write_text(saved.replace('"bits": 4', '"bits": 4, "colour": 1', 1))
    with pytest.raises(ValueError, match=r"asymq\.json: QuantSpec: unknown fields \['colour'\]"):
        asymq.load(tmp_path)
    path.write_text(saved)
    fit = "holds a GPT2LMHeadModel, which this OPTForCausalLM does not fit: .* is called"
    with pytest.raises(ValueError, match=fit) as error:
        asymq.load(tmp_path, opt())
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)
