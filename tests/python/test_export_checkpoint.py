"""Checkpoints of compressed-tensors, as transformers loads them without asymq."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import DECODERS, FAMILIES, MIXTURES, logits, tokens
from torch import nn

import asymq
from asymq import PerChannel, PerGroup, PerTensor, PerToken, QuantConfig, QuantSpec
from asymq.__main__ import main
from asymq.export import checkpoint

transformers = pytest.importorskip("transformers", minversion="5.4")
pytest.importorskip("compressed_tensors", reason="install asymq[checkpoint]")

MODELS = {**DECODERS, **FAMILIES, **MIXTURES}
GROUPS = PerGroup(16)
FLOAT = {"embedding": None, "head": None}
FIXED = QuantSpec(8, symmetric=True, granularity=PerToken(), learn=False)


def weights(bits, granularity=GROUPS, symmetric=True, **options):
    spec = QuantSpec(bits, symmetric=symmetric, granularity=granularity)
    return QuantConfig(spec, **FLOAT, **options)


def learned(family, config, dtype=torch.float32):
    """A prepared model whose weights' ranges are as after learning: codes saturate."""
    model = MODELS[family]().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what asymq does not quantize in mixtures
        asymq.prepare(model, config)
    asymq.calibrate(model, [tokens(seed=seed) for seed in (3, 4)])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, quantizer in asymq.named_quantizers(model):
            for parameter in quantizer.parameters() if not quantizer.live else ():
                parameter *= 0.5 + 0.6 * torch.rand(parameter.shape, generator=generator)
    return model


GRANULARITIES = {"tensor": PerTensor(), "channel": PerChannel(), "group": GROUPS}
# Of Linears of which each is quantized in another way.
MIXED = weights(
    4,
    norm_weight=QuantSpec(12),
    overrides={
        "weight:*q_proj*": QuantSpec(3, symmetric=True, granularity=PerChannel()),
        "weight:*k_proj*": QuantSpec(8, symmetric=True),
        "weight:*v_proj*": QuantSpec(4, symmetric=True, full_range=True),
        "weight:*o_proj*": QuantSpec(8, granularity=PerChannel()),
        "weight:*up_proj*": None,
    },
)
EXACT = {
    **{
        f"llama-{bits}-{name}": ("llama", weights(bits, granularity))
        for bits in (3, 4, 8)
        for name, granularity in GRANULARITIES.items()
    },
    "asymmetric-8": ("llama", weights(8, PerChannel(), symmetric=False)),
    "asymmetric-3-tensor": ("llama", weights(3, PerTensor(), symmetric=False)),
    "dequantize-asymmetric-3": ("llama", weights(3, symmetric=False)),
    "dequantize-asymmetric-4": ("llama", weights(4, PerChannel(), symmetric=False)),
    "mixed": ("llama", MIXED),
    "tied": ("llama-tied", replace(weights(4), embedding=QuantSpec(8), head=QuantSpec(8))),
    "phi3": ("phi3", weights(4)),
    "gemma3": ("gemma3", weights(4)),
    "qwen3": ("qwen3", weights(4)),
    "mixtral": ("mixtral", weights(4)),
    "qwen3-moe": ("qwen3-moe", weights(3, PerTensor())),
    "opt": ("opt", weights(4)),
}
INPUTS = {
    "w8a8": (weights(8, PerChannel(), input=FIXED), "dynamic"),
    "w8a8-dropped": (weights(8, PerChannel(), input=FIXED), "drop"),
    "w4a8": (QuantConfig.w4a8(16), "drop_factors"),
    "w4a4": (QuantConfig.w4a4(16), "dynamic"),
}

LOADER = """
import sys, torch, transformers
from pathlib import Path
folder, result = Path(sys.argv[1]), {}
ids = torch.load(folder / "tokens.pt")
for path in sorted(p for p in folder.iterdir() if p.is_dir()):
    options = {}
    if path.name.startswith("dequantize"):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, **options
    )
    with torch.no_grad():
        logits = model(ids).logits
    result[path.name] = logits, {key: list(value) for key, value in info.items() if value}
assert "asymq" not in sys.modules
torch.save(result, folder / "logits.pt")
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """By name: the model, its report, its folder, and what a process without asymq makes of that:
    logits, and what it says of missing and other tensors."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = {name: (*case, "refuse") for name, case in EXACT.items()}
    cases |= {name: ("llama", *case) for name, case in INPUTS.items()}
    exported = {}
    for name, (family, config, activations) in cases.items():
        model = learned(family, config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = asymq.export_checkpoint(model, folder / name, activations=activations)
        exported[name] = model, report, folder / name
    torch.save(tokens(), folder / "tokens.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOADER, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(folder / "logits.pt")
    return {name: (*exported[name], *results[name]) for name in exported}


@pytest.mark.parametrize("name", EXACT)
def test_transformers_computes_what_was_trained(loaded, name):
    model, _, _, result, info = loaded[name]
    assert not info
    torch.testing.assert_close(result, logits(model, tokens()), rtol=0, atol=1e-5 * (name == "opt"))


def test_weights_in_bfloat16_are_those_that_were_trained(tmp_path):
    model = learned("llama", weights(4), torch.bfloat16)
    with pytest.warns(UserWarning, match="may round them to bfloat16"):
        asymq.export_checkpoint(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    own, found = asymq.convert(model).state_dict(), loaded.state_dict()
    assert found.keys() == own.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, own[name]), name


@pytest.mark.parametrize("name", EXACT)
def test_every_code_is_asymq_s(loaded, name):
    from compressed_tensors.compressors import unpack_from_int32

    model, report, folder, *_ = loaded[name]
    tensors = load_file(folder / "model.safetensors")
    quantizers = dict(asymq.named_quantizers(model))
    rows = [row for row in report.rows if row.container.startswith("int")]
    assert rows
    for row in rows if model.config.model_type not in ("mixtral", "qwen3_moe") else ():
        quantizer = quantizers[row.name]
        spec, scale, offset = quantizer.spec, *quantizer.scale_offset()
        weight = model.get_parameter(row.name.removesuffix("_quantizer")).detach()
        codes = asymq.quantize(
            weight, scale, offset, bits=spec.bits, eps=spec.eps, full_range=spec.full_range
        )
        stored = tensors[row.tensor]
        if spec.bits < 8:
            assert stored.dtype == torch.int32
            assert stored.shape[1] == -(-weight.shape[1] * spec.bits // 32)
            stored = unpack_from_int32(stored, spec.bits, weight.shape)
        # Those of asymmetric grids are counted from n.
        shift = 0 if spec.symmetric else 2 ** (spec.bits - 1)
        assert torch.equal(stored.int() + shift, codes.int())
        name = row.tensor.removesuffix("_packed")
        assert torch.equal(tensors[f"{name}_scale"], scale) and torch.equal(row.scale, scale)
        assert (f"{name}_zero_point" in tensors) == (not spec.symmetric)


def test_experts_are_stored_one_by_one(loaded):
    _, report, folder, *_ = loaded["qwen3-moe"]
    tensors = load_file(folder / "model.safetensors")
    experts = {name for name in tensors if ".experts." in name}
    assert len(experts) == 2 * 4 * 3 * 3  # layers, experts, weights, tensors of each
    row = next(row for row in report.rows if row.name.endswith("experts.gate_up_proj_quantizer"))
    pattern = "model.layers.0.mlp.experts.*.{}_proj.weight_packed"
    assert row.tensor == ", ".join(pattern.format(half) for half in ("gate", "up"))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.gate" in config["ignore"]


@pytest.mark.parametrize("name", [*EXACT, *INPUTS])
def test_every_quantizer_has_a_row(loaded, name):
    model, report, folder, *_ = loaded[name]
    assert [row.name for row in report.rows] == [n for n, _ in asymq.named_quantizers(model)]
    assert all(row.container or row.note for row in report.rows)
    assert {path.name for path in report.files} == set(os.listdir(folder))
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    for row in report.rows:
        if row.container and row.kind == "weight" and "*" not in row.tensor:
            assert row.tensor in names


def test_what_the_configuration_says(loaded):
    def quantization(name):
        return json.loads((loaded[name][2] / "config.json").read_text())["quantization_config"]

    found = quantization("llama-4-group")
    assert found == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 16,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
    }
    assert quantization("llama-8-channel")["format"] == "int-quantized"
    assert quantization("asymmetric-8")["format"] == "naive-quantized"
    mixed = quantization("mixed")
    assert mixed["format"] == "mixed-precision" and len(mixed["config_groups"]) == 5
    assert "model.layers.1.mlp.up_proj" in mixed["ignore"]
    assert mixed["config_groups"]["group_0"]["targets"][0].startswith("re:^model")
    config = json.loads((loaded["llama-4-group"][2] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"


def test_tied_weights_are_stored_once_and_dequantized(loaded):
    model, report, folder, *_ = loaded["tied"]
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    rows = {row.name: row for row in report.rows}
    row = rows["model.embed_tokens.weight_quantizer"]
    assert (row.container, row.note) == ("float32", "dequantized: a tied weight")
    assert torch.equal(tensors[row.tensor], asymq.convert(model).model.embed_tokens.weight)


# ---- activations ---------------------------------------------------------------------------------


def test_inputs_of_tokens_are_dynamic_ones(loaded):
    model, report, folder, result, info = loaded["w8a8"]
    assert not info
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert group["format"] == "int-quantized"
    assert group["input_activations"] == group["weights"] | {"strategy": "token", "dynamic": True}
    row = next(row for row in report.rows if row.kind == "input")
    assert row.note.startswith("dynamic; transformers divides by 127.5, not 127")
    # As far from the trained one as rounding inputs otherwise goes, and not the one without.
    own, dropped = logits(model, tokens()), loaded["w8a8-dropped"][3]
    assert not torch.equal(result, dropped)
    assert (result - own).abs().mean() < 0.05 * own.abs().mean()


@pytest.mark.parametrize("name", ["w4a8", "w4a4"])
def test_inputs_of_fewer_bits_and_in_groups(loaded, name):
    _, report, folder, _, info = loaded[name]
    assert not info
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    inputs = config["config_groups"]["group_0"]["input_activations"]
    expected = {"w4a8": (8, "token", None), "w4a4": (4, "group", 16)}[name]
    assert (inputs["num_bits"], inputs["strategy"], inputs["group_size"]) == expected
    assert not inputs["symmetric"] and inputs["dynamic"]
    notes = {row.name: row.note for row in report.rows}
    assert notes["model.layers.0.mlp.down_proj.input_quantizer"] == "dynamic"
    if name == "w4a8":
        assert notes["lm_head.input_quantizer"] == "left out of layers in float"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_runtimes_codes_of_inputs_differ_by_one_at_most(symmetric, group, bits, tmp_path):
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    spec = QuantSpec(bits, symmetric=symmetric, granularity=PerToken(group), learn=False)
    model = learned("llama", weights(8, PerChannel(), input=spec))
    asymq.export_checkpoint(model, tmp_path / "out", activations="dynamic")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    args = QuantizationArgs(**config["config_groups"]["group_0"]["input_activations"])
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, 32)
    scale, zero = compute_dynamic_scales_and_zp(x, args, layer)
    theirs, own = fake_quantize(x, scale, zero, args), layer.input_quantizer(x)
    span = x.view(3, 5, -1, group or 32)
    top = span.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    width = span.amax(-1, keepdim=True) - span.amin(-1, keepdim=True)
    step = top if symmetric else width / (2**bits - 1)
    # A code apart, and the scales' own difference.
    bound = 1.01 * step + (span.abs() / (2**bits - 1) if symmetric else 0)
    assert ((theirs - own).view_as(span).abs() <= bound).all()


def test_learned_factors_are_named_and_left_out_only_if_asked(tmp_path):
    model = learned("llama", weights(8, PerChannel(), input=replace(FIXED, learn=True)))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.input_quantizer.gamma.fill_(0.75)
    with pytest.raises(ValueError, match=r"1 of 8 factors.*layers\.1.*learn=False"):
        asymq.export_checkpoint(model, tmp_path / "out", activations="dynamic")
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="1 learned factors"):
        report = asymq.export_checkpoint(model, tmp_path / "out", activations="drop_factors")
    notes = {row.name: row.note for row in report.rows}
    assert notes["model.layers.1.mlp.down_proj.input_quantizer"].endswith(
        "factors from 0.75 to 0.75 left out"
    )
    assert "left out" not in notes["model.layers.0.mlp.down_proj.input_quantizer"]


def test_activations_are_left_out_with_a_warning(tmp_path):
    config = QuantConfig.npu()
    model = learned("llama", config)
    count = sum(isinstance(q, asymq.QuantAct) for _, q in asymq.named_quantizers(model))
    with pytest.raises(ValueError, match=rf"\({count} quantizers of activations in all\)"):
        asymq.export_checkpoint(model, tmp_path / "out")
    with pytest.warns(UserWarning, match=rf"{count} quantizers of activations are left out"):
        report = asymq.export_checkpoint(model, tmp_path / "out", activations="drop")
    assert sum(row.note == "left out (activations='drop')" for row in report.rows) == count


# ---- refusals ------------------------------------------------------------------------------------


def _uncalibrated():
    return asymq.prepare(MODELS["llama"](), weights(4))


def _off():
    model = learned("llama", weights(4))
    asymq.disable_quantizers(model)
    return model


def _beyond_zero():
    model = learned("llama", weights(4, PerChannel(), symmetric=False))
    quantizer = model.model.layers[1].mlp.up_proj.weight_quantizer
    low, high = torch.ones(quantizer.range_shape), 2 * torch.ones(quantizer.range_shape)
    quantizer.set_range(low, high)
    return model


def _with_nan():
    model = learned("llama", weights(4))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    return model


def _adapted():
    peft = pytest.importorskip("peft")
    model = learned("llama", weights(4))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).base_model.model


def _bare():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    asymq.prepare(net, QuantConfig(QuantSpec(4, symmetric=True)))
    asymq.calibrate(net, [torch.randn(4, 8)])
    return net


def _untied():
    model = learned("llama-tied", weights(4))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


REFUSED = {
    "float": (lambda: MODELS["llama"](), ValueError, "no quantizers; call asymq.prepare"),
    "uncalibrated": (_uncalibrated, RuntimeError, r"layers\.0.*calibrate the model first"),
    "off": (_off, ValueError, "is off: call asymq.enable_quantizers"),
    "NaN": (_with_nan, ValueError, r"layers\.0\.mlp\.up_proj\.weight_quantizer has NaNs"),
    "adapters": (_adapted, ValueError, "adapters of peft.*merge_and_unload"),
    "no model of transformers": (_bare, ValueError, "this Sequential is no model of transformers"),
    "untied": (_untied, ValueError, "lm_head.weight and model.embed_tokens.weight as two tensors"),
    "Conv1D": (
        lambda: learned("gpt2", weights(4)),
        ValueError,
        r"h\.0\.attn\.c_attn\.weight.*Conv1D.*\(8 in all\).*nn\.Linear: use asymq\.export_onnx",
    ),
    "bits": (
        lambda: learned("llama", weights(9)),
        ValueError,
        r"q_proj\.weight_quantizer has 9 bits, and compressed-tensors holds 2 to 8",
    ),
    "groups along the output": (
        lambda: learned("llama", weights(4, PerGroup(16, axis=0))),
        ValueError,
        r"ranges of shape \[2, 32\] on a weight of \[32, 32\]",
    ),
    "channels of the input": (
        lambda: learned("llama", weights(4, PerChannel(axis=1))),
        ValueError,
        r"ranges of shape \[1, 32\].*PerChannel\(\) or PerGroup",
    ),
    "zero point": (_beyond_zero, ValueError, r"layers\.1\.mlp\.up_proj.*force_zero=True"),
    "dynamic": (
        lambda: learned("llama", QuantConfig(QuantSpec(4, dynamic=True), **FLOAT)),
        ValueError,
        "has a dynamic range.*asymq.convert",
    ),
    "the head alone": (
        lambda: learned("llama", replace(weights(4), weight=None, head=QuantSpec(8))),
        ValueError,
        "no weight of an nn.Linear, but for heads",
    ),
    "zero points of several kinds": (
        lambda: learned(
            "llama", weights(4, symmetric=False, overrides={"weight:*q_proj*": QuantSpec(8)})
        ),
        ValueError,
        "zero points for each channel or group.*symmetric, PerTensor",
    ),
    "experts of 8 bits": (
        lambda: learned("mixtral", weights(8)),
        ValueError,
        r"gate_up_proj_quantizer is of 4 experts, which need 2 to 7 bits",
    ),
    "experts in two ways": (
        lambda: learned("mixtral", weights(4, overrides={"*down_proj*": QuantSpec(3, True)})),
        ValueError,
        "reads all experts in one way",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, tmp_path):
    make, error, message = REFUSED[case]
    model = make()
    with pytest.raises(error, match=message):
        asymq.export_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (weights(4), {"format": "gguf"}, "format must be 'compressed-tensors', got 'gguf'"),
        (weights(4), {"activations": "keep"}, "activations must be one of refuse, drop"),
        (
            QuantConfig.w4a8(16, cache=8),
            {"activations": "dynamic"},
            r"key_quantizer \(4 in all\) is no PerToken input",
        ),
        (
            QuantConfig.w4a8(16),
            {"activations": "dynamic"},
            r"lm_head\.input_quantizer.*stored in float.*head=None",
        ),
        (
            weights(4, input=replace(FIXED, bits=12)),
            {"activations": "dynamic"},
            r"q_proj\.input_quantizer \(8 in all\).*with 2 to 8 bits",
        ),
        (
            weights(4, symmetric=False, input=FIXED),
            {"activations": "dynamic"},
            "without inputs: prepare it symmetric",
        ),
    ],
)
def test_options_that_do_not_fit(config, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        asymq.export_checkpoint(learned("llama", config), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


# ---- the model and the folder --------------------------------------------------------------------


def _everything(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {
        name: (type(m), m.training, len(m._forward_hooks), vars(m).get("reached"))
        for name, m in model.named_modules()
    }
    return state, modules, model.config.to_dict(), model.config._attn_implementation


@pytest.mark.parametrize("activations", ["drop", "refuse"])
def test_the_model_is_left_as_it_was(activations, tmp_path):
    model = learned("llama", QuantConfig.npu()).train()
    state, *before = _everything(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if activations == "drop":
            asymq.export_checkpoint(model, tmp_path / "out", activations="drop")
        else:
            with pytest.raises(ValueError, match="activations"):
                asymq.export_checkpoint(model, tmp_path / "out")
    after, *rest = _everything(model)
    assert rest == before and after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_the_folder_is_complete_or_not_there(tmp_path, monkeypatch):
    model = learned("llama", weights(4))

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.config), "save_pretrained", fail)
        with pytest.raises(OSError, match="no space"):
            asymq.export_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tokenizer.json").write_text("{}")
    monkeypatch.setattr(checkpoint, "_LARGEST_FILE", "20KB")
    report = asymq.export_checkpoint(model, tmp_path / "out")
    shards = [path for path in report.files if path.suffix == ".safetensors"]
    assert len(shards) > 1 and all(path.exists() for path in report.files)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    monkeypatch.undo()
    report = asymq.export_checkpoint(model, tmp_path / "out")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert set(os.listdir(tmp_path / "out")) == names


def test_the_files_of_another_model_stay(tmp_path):
    model = learned("llama", weights(4))
    MODELS["llama"]().save_pretrained(tmp_path / "float")
    asymq.save(model, tmp_path / "saved")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "file").write_text("")
    for name in ("float", "saved", "damaged"):
        before = {path: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(ValueError, match=rf"{name} holds .* give another folder"):
            asymq.export_checkpoint(model, tmp_path / name)
        assert before == {path: path.read_bytes() for path in (tmp_path / name).iterdir()}
    with pytest.raises(ValueError, match="is a file"):
        asymq.export_checkpoint(model, tmp_path / "file")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors", None)
    with pytest.raises(ImportError, match=r"pip install 'asymq\[checkpoint\]'"):
        asymq.export_checkpoint(learned("llama", weights(4)), tmp_path / "out")


def test_the_command_does_the_same(tmp_path, monkeypatch, capsys):
    model = learned("llama", weights(4, input=FIXED))
    asymq.save(model, tmp_path / "saved")
    report = asymq.export_checkpoint(model, tmp_path / "own", activations="dynamic")

    def run(*arguments):
        command = ["asymq", "export", str(tmp_path / "saved"), str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [*command, "--format", "compressed-tensors", *arguments])
        main()

    with pytest.raises(SystemExit, match="activations='drop' leaves them out"):
        run()
    run("--activations", "dynamic")
    shown = capsys.readouterr().out
    assert shown.splitlines()[:-4] == str(report).splitlines()[:-4]
    for path in report.files:
        other = tmp_path / "out" / path.name
        if path.suffix == ".json":
            assert other.read_text() == path.read_text()
            continue
        found, own = load_file(other), load_file(path)
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) for name in own)
