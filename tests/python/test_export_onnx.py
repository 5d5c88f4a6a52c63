"""ONNX files, run by onnxruntime in processes without asymq."""

import copy
import json
import sys
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

import asymq
from asymq import PerChannel, PerGroup, PerToken, QuantAct, QuantConfig, QuantSpec
from asymq.__main__ import main
from asymq.export.grids import Grid

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from compare import spread  # noqa: E402
from onnx_session import EXACT, outputs  # noqa: E402
from tiny_models import DECODERS, FAMILIES, logits, prepared, tokens  # noqa: E402

# What keeps onnxruntime from rounding ties otherwise in integer kernels, of 8 bits alone.
FLOAT = {"session.disable_quant_qdq": "1"}


def quantizer(low, high, **spec):
    made = QuantAct(QuantSpec(**{"parameterization": "min_max"} | spec))
    made.set_range(torch.tensor([low]), torch.tensor([high]))
    return made


def everything(model):
    """All that an export must leave as it was."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {
            name: {key: copy.copy(value) for key, value in vars(module).items()}
            for name, module in model.named_modules()
        },
        [p.requires_grad for p in model.parameters()],
    )


def assert_same(model, before):
    state, modules, learned = everything(model)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, before[0][name], atol=0, rtol=0, equal_nan=True)
    assert learned == before[2]
    for name, attributes in modules.items():
        assert attributes.keys() == before[1][name].keys(), name
        for key, value in attributes.items():
            if not key.startswith("_") or key.endswith("hooks"):
                assert value is before[1][name][key] or value == before[1][name][key], (name, key)


def steps_between(actual, expected, scale):
    return ((actual - expected).abs() / scale).max().item()


# ---- grids ---------------------------------------------------------------------------------------


class Rows(nn.Module):
    """Row i of x through quantizer i."""

    def __init__(self, quantizers):
        super().__init__()
        self.acts = nn.ModuleList(quantizers)

    def forward(self, x):
        return torch.stack([act(row) for act, row in zip(self.acts, x.unbind(), strict=True)])


def grids():
    """Ranges with 0 within, at either end and outside, and symmetric ones, of all bits."""
    ends = {"inside": (-0.7, 1.9), "low": (0.0, 2.3), "high": (-1.3, 0.0)}
    for bits in range(2, 17):
        for low, high in ends.values():
            yield quantizer(low, high, bits=bits)
        if bits < 15:
            yield quantizer(1.1, 1.9, bits=bits)
        if bits < 16:
            yield quantizer(-0.9, -0.2, bits=bits)
        for full_range in (False, True):
            yield quantizer(-1.7, 1.7, bits=bits, symmetric=True, full_range=full_range)


def test_every_grid_is_bit_equal(tmp_path):
    """Also on ties, at the ends, beyond them, and for infinities."""
    acts = list(grids())
    rows = []
    for act in acts:
        grid = Grid.of(act)
        middle = torch.linspace(grid.lowest.item() - 3, grid.highest.item() + 3, 301).round()
        ties = (middle + 0.5) * grid.scale
        near = torch.cat([ties.nextafter(ties + 1), ties.nextafter(ties - 1)])
        far = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, 0.0, -0.0])
        rows.append(torch.cat([middle * grid.scale, ties, near, far]))
    model, x = Rows(acts), torch.stack(rows)
    path = tmp_path / "model.onnx"
    report = asymq.export_onnx(model, x, path, dynamic=False)
    assert len(report.rows) == len(acts)
    assert {row.container for row in report.rows} == {"uint8", "uint16", "int8", "int16"}
    for level in ("DISABLE_ALL", "ENABLE_ALL"):
        assert torch.equal(outputs(path, {"x": {"x": x}}, level)["x"], model(x)), level


def test_what_no_container_holds_is_refused(tmp_path):
    for low, high, bits in ((1.1, 1.9, 16), (-2.0, -1.99, 12)):
        model = nn.Sequential(quantizer(low, high, bits=bits))
        with pytest.raises(ValueError, match=r"export_onnx: 0: its range .* too far from 0"):
            asymq.export_onnx(model, torch.zeros(2), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# ---- language models -----------------------------------------------------------------------------

CASES = {
    "gpt2-w4a12": (FAMILIES["gpt2"], QuantConfig.table2("beta_gamma")),
    "gpt2-w8a8": (
        partial(FAMILIES["gpt2"], n_layer=1),
        QuantConfig.table2("min_max", weight_bits=8, activation_bits=8),
    ),
    "opt-w4a12": (
        partial(FAMILIES["opt"], num_hidden_layers=1),
        QuantConfig.table2("scale_offset"),
    ),
    "opt-w8a8": (
        partial(FAMILIES["opt"], num_hidden_layers=1),
        QuantConfig.table2("min_max", weight_bits=8, activation_bits=8),
    ),
    "llama-npu": (partial(DECODERS["llama"], num_hidden_layers=1), QuantConfig.npu()),
}


@pytest.mark.parametrize("case", CASES)
def test_language_models(case, tmp_path):
    """At another batch and length than the example's, and with rows that are padded left."""
    make, config = CASES[case]
    model = prepared(make(), config).train()
    before = everything(model)
    ids = tokens(2, 6)
    path = tmp_path / "model.onnx"
    report = asymq.export_onnx(model, {"input_ids": ids, "attention_mask": ids.clip(1, 1)}, path)
    assert_same(model, before)
    model.eval()

    assert report.files == (path,)
    assert [row.name for row in report.rows] == [n for n, _ in asymq.named_quantizers(model)]
    assert all(row.container and row.tensor for row in report.rows)
    onnx.checker.check_model(str(path), full_check=True)
    _check_codes(model, report, path)

    ids = tokens(3, 11, seed=7)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :9] = 0, 0
    feeds = {"whole": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
    feeds["padded"] = {"input_ids": ids, "attention_mask": mask}
    scale = model.lm_head.output_quantizer.scale_offset()[0]
    few, optimized = (1, FLOAT) if case.endswith("w8a8") else (4, EXACT)
    for level, config in (("DISABLE_ALL", {}), ("ENABLE_ALL", optimized)):
        found = outputs(path, feeds, level, config)
        for name, given in feeds.items():
            seen = given["attention_mask"].bool()
            y, expected = found[name][seen], logits(model, **given)[seen]
            assert steps_between(y, expected, scale) <= few + 0.01
            assert (y != expected).float().mean() <= (0.01 if few == 1 else 0.1)


def _check_codes(model, report, path, least=6):
    """The integers in the file are those of asymq.quantize, each under its parameter's name."""
    held = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    parameters = dict(model.named_parameters())
    found = 0
    for row in report.rows:
        if row.kind not in ("weight", "norm_weight") or row.container == "float32":
            continue
        name = row.tensor.removesuffix("_quantized")
        weight, spec = parameters[name], dict(asymq.named_quantizers(model))[row.name].spec
        scale, offset = dict(asymq.named_quantizers(model))[row.name].scale_offset()
        codes = asymq.quantize(
            weight.detach(), scale, offset, bits=spec.bits, full_range=spec.full_range
        )
        codes = codes.int()
        if offset is not None:
            ranges = offset.round().int() + row.zero_point
            codes = codes + spread(ranges, codes.shape).int()
        stored = torch.from_numpy(onnx.numpy_helper.to_array(held[row.tensor]).astype("int32"))
        transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
        assert torch.equal(stored.t() if transposed else stored, codes), name
        assert held[row.tensor].data_type == getattr(onnx.TensorProto, row.container.upper())
        assert name not in held
        found += 1
    assert found >= least


# ---- other models --------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of most kinds, and a quantizer of the user's own that is called twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv1d(16, 8, 3)
        self.act = QuantAct(QuantSpec(6, granularity=PerGroup(4)), 16)

    def forward(self, ids, shift):
        x = self.act(self.norm(self.table(ids) + shift))
        x = self.act(x + self.second(torch.relu(self.first(x))))
        return self.conv(x.transpose(1, 2))


def net(**config):
    model = Net()
    with torch.no_grad():
        model.norm.weight.add_(0.3 * torch.randn(16))
    specs = {"weight": QuantSpec(4, symmetric=True, granularity=PerChannel())}
    specs |= {"activation": QuantSpec(8), "norm_weight": QuantSpec(12)}
    asymq.prepare(model, QuantConfig(**specs | config))
    inputs = {"ids": torch.randint(11, (3, 7)), "shift": torch.randn(3, 7, 16)}
    asymq.calibrate(model, [inputs])
    return model.eval(), inputs


def assert_runs(model, inputs, path, **config):
    with torch.no_grad():
        expected = model(**inputs)
    y = outputs(path, {"x": inputs}, **config)["x"]
    # Convolutions and products add in another order.
    assert torch.allclose(y, expected, atol=1e-6, rtol=1e-6)


WEIGHTS = {
    "tensor": QuantSpec(3, symmetric=True),
    "channels": QuantSpec(5, granularity=PerChannel()),
    "rows": QuantSpec(8, symmetric=True, granularity=PerChannel(1)),
    "groups": QuantSpec(4, symmetric=True, granularity=PerGroup(4)),
    "asymmetric": QuantSpec(4, granularity=PerGroup(8)),
    "full": QuantSpec(4, symmetric=True, granularity=PerGroup(4, axis=0), full_range=True),
}


def test_granularities_of_weights(tmp_path):
    layers = {name: nn.Linear(16, 16) for name in WEIGHTS}
    model = nn.Sequential(OrderedDict(layers))
    overrides = {f"{name}.weight_quantizer": spec for name, spec in WEIGHTS.items()}
    asymq.prepare(model, QuantConfig(overrides=overrides))
    inputs = {"input": torch.randn(3, 16)}
    asymq.calibrate(model, [inputs["input"]])
    path = tmp_path / "model.onnx"
    _check_codes(model, asymq.export_onnx(model, inputs["input"], path), path)
    assert "Transpose" not in {node.op_type for node in onnx.load(path).graph.node}
    assert_runs(model, inputs, path)


@pytest.mark.parametrize("others", [None, QuantSpec(4)], ids=["float", "quantized"])
def test_equal_weights_have_a_name_each(others, tmp_path):
    """Those of new norms, and of layers copied."""
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.load_state_dict(first.state_dict())
    layers = {"first": first, "norm": nn.LayerNorm(16), "second": second, "last": nn.LayerNorm(16)}
    model = nn.Sequential(OrderedDict(layers))
    overrides = {"second.weight_quantizer": QuantSpec(5)}
    asymq.prepare(model, QuantConfig(others, None, others, overrides=overrides))
    inputs = {"input": torch.randn(3, 16)}
    asymq.calibrate(model, [inputs["input"]])
    path = tmp_path / "model.onnx"
    report = asymq.export_onnx(model, inputs["input"], path)
    _check_codes(model, report, path, least=1 if others is None else 4)
    kinds = ("weight", "norm_weight")
    tensors = {row.name: row.tensor for row in report.rows if row.kind in kinds}
    assert tensors["second.weight_quantizer"] == "second.weight_quantized"
    assert all(tensor.startswith(name.split(".")[0]) for name, tensor in tensors.items())
    assert len(tensors) == (1 if others is None else 4)
    assert_runs(model, inputs, path)


@pytest.mark.parametrize("how", ["inputs", "outputs"])
def test_layers_of_any_model(how, tmp_path):
    """Inputs of layers, or outputs; a quantizer that is called twice has both its tensors."""
    spec = QuantSpec(8, granularity=PerChannel())
    skip = ["*conv.*"]
    config = {"activation": None, "input": spec} if how == "inputs" else {"activation": spec}
    model, inputs = net(**config, skip=skip)
    path = tmp_path / "model.onnx"
    example = tuple(inputs.values()) if how == "inputs" else inputs
    report = asymq.export_onnx(model, example, path)
    assert [value.name for value in onnx.load(path).graph.input] == ["ids", "shift"]
    rows = {row.name: row for row in report.rows}
    assert rows["act"].tensor == "act, act_1"
    assert_runs(model, inputs, path)


def test_float_weights_that_lie_beside(tmp_path, monkeypatch):
    monkeypatch.setattr("asymq.export.graph._LARGEST_FILE", 100)
    model, inputs = net()
    path = tmp_path / "model.onnx"
    report = asymq.export_onnx(model, inputs, path, weights="float", opset=22, dynamic=False)
    assert report.files == (path, tmp_path / "model.onnx.data")
    assert sorted(tmp_path.iterdir()) == sorted(report.files)
    file = onnx.load(path)
    assert file.opset_import[0].version == 22
    assert [d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim] == [3, 7]
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    weight = torch.from_numpy(held["first.weight"].copy())
    assert torch.equal(weight.t(), model.first.weight_quantizer(model.first.weight))
    rows = {row.name: row for row in report.rows}
    assert rows["first.weight_quantizer"].container == "float32"
    assert not any(name.startswith("first.weight_") for name in held)
    assert_runs(model, inputs, path)


def test_rows_say_what_is_not_an_integer(tmp_path):
    """A norm's weight so close to 1 that its zero point has more than 16 bits; what nobody uses."""
    model, inputs = net()
    model.norm.weight_quantizer.set_range(torch.tensor([1.0]), torch.tensor([1.01]))
    model.unused = quantizer(-1.0, 1.0)
    path = tmp_path / "model.onnx"
    rows = {row.name: row for row in asymq.export_onnx(model, inputs, path).rows}
    norm, unused = rows["norm.weight_quantizer"], rows["unused"]
    assert (norm.container, norm.tensor) == ("float32", "norm.weight")
    assert "no integer of 16 bits" in norm.note
    assert not unused.container and "no forward reaches it" in unused.note
    assert_runs(model, inputs, path)


# ---- refusals ------------------------------------------------------------------------------------


def _off(model):
    asymq.disable_quantizers(model.act)


def _observing(model):
    model.act.start_observing()


def _half(model):
    model.second.half()


def _uncalibrated(model):
    model.act.calibrated = False


def _damaged(model):
    with torch.no_grad():
        model.act.gamma[1] = torch.nan


def _tokens(model):
    model.act = QuantAct(QuantSpec(8, granularity=PerToken()))


REFUSED = {
    "off": (_off, ValueError, r"act is off: call asymq\.enable_quantizers"),
    "observing": (_observing, ValueError, r"act is observing: .*enable_quantizers"),
    "half": (_half, ValueError, r"second\.weight is float16, .* model\.float\(\)"),
    "uncalibrated": (_uncalibrated, RuntimeError, r"act: its range is not set; calibrate"),
    "damaged": (_damaged, ValueError, r"act: its range is .*nan"),
    "dynamic": (_tokens, ValueError, r"act has a dynamic range .*asymq\.export_checkpoint"),
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("function", ["export_onnx", "export_encodings"])
def test_what_cannot_be_exported_is_refused(function, how, tmp_path):
    change, error, message = REFUSED[how]
    model, inputs = net()
    change(model)
    before = everything(model)
    with pytest.raises(error, match=f"asymq.{function}: {message}"):
        getattr(asymq, function)(model, inputs, tmp_path / "model.onnx")
    assert_same(model, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 20}, "opset must be at least 21"),
        ({"weights": "int"}, "weights must be 'integer' or 'float'"),
        ({"example_inputs": [1]}, "example_inputs must be a tensor, a tuple"),
        ({"example_inputs": {"ids": 1}}, "example_inputs holds no tensor"),
        ({"model": nn.Linear(2, 2)}, "no quantizers; call asymq.prepare"),
    ],
)
def test_arguments(options, message, tmp_path):
    model, inputs = net()
    given = {"model": model, "example_inputs": inputs, "path": tmp_path / "x.onnx"} | options
    with pytest.raises(ValueError, match=f"asymq.export_onnx: .*{message}"):
        asymq.export_onnx(**given)
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced(tmp_path):
    """It is as it was, and so are the files that were there."""
    model = asymq.prepare(Branching(), QuantConfig(QuantSpec(4, symmetric=True)))
    asymq.calibrate(model, [torch.ones(2, 4)])
    path = tmp_path / "model.onnx"
    path.write_text("before")
    before = everything(model)
    with pytest.raises(ValueError, match=r"export_onnx: .* cannot read this Branching"):
        asymq.export_onnx(model, torch.ones(2, 4), path)
    assert_same(model, before)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "ml_dtypes"])
def test_a_missing_package_names_the_extra(missing, tmp_path, monkeypatch):
    model, inputs = net()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"asymq.export_onnx needs {missing}: .*asymq\[onnx\]"):
        asymq.export_onnx(model, inputs, tmp_path / "model.onnx")


# ---- the command ---------------------------------------------------------------------------------


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["asymq", "export", *map(str, arguments)])
    main()


def test_the_command_and_what_it_writes(tmp_path, monkeypatch, capsys):
    model = FAMILIES["gpt2"](n_layer=1, n_embd=256, vocab_size=2048)
    parameters = sum(p.numel() for p in model.parameters())
    prepared(model)
    path = tmp_path / "model.onnx"
    asymq.save(model, tmp_path / "saved")
    command(monkeypatch, tmp_path / "saved", path, "--format", "onnx", "--length", 7)
    printed = capsys.readouterr().out
    assert path.stat().st_size < 0.55 * parameters  # of 4 bits most of them
    file = onnx.load(path)
    assert [value.name for value in file.graph.input] == ["input_ids", "attention_mask"]
    for value in file.graph.input:
        shape = [d.dim_param for d in value.type.tensor_type.shape.dim]
        assert shape == ["batch", "length"]
    assert [value.name for value in file.graph.output] == ["logits"]
    assert [(o.domain, o.version) for o in file.opset_import] == [("", 21)]
    assert not file.functions
    made = {name for node in file.graph.node for name in node.output}
    assert {
        "transformer.h.0.attn.scores",
        "transformer.h.0.attn.scores_quantized",
        "transformer.h.0.attn.scores_dequantized",
        "transformer.h.0.mlp.c_fc.weight_dequantized",
    } <= made
    held = [tensor.name for tensor in file.graph.initializer]
    assert "transformer.h.0.attn.c_attn.bias" in held
    # The tied head reads the table's one initializer, and the row says so.
    tied = [name for name in held if name.endswith("_quantized") and "wte" in name]
    assert tied == ["transformer.wte.weight_quantized"]
    assert not any(name.startswith("lm_head.weight") for name in held)
    assert "Transpose" in next(line for line in printed.splitlines() if "wte" in line)
    values = {p.key: p.value for p in file.metadata_props}
    assert file.producer_name == "asymq" and values["asymq.version"] == asymq.__version__
    assert json.loads(values["asymq.bits"]) == {
        "activation": [12],
        "norm_weight": [12],
        "weight": [4],
    }
    assert json.loads(values["asymq.session_config"])
    text = path.read_bytes()
    assert b"/python/" not in text and b".py" not in text
    lines = printed.splitlines()
    assert lines[0].split() == "name kind bits container scale zero point tensor note".split()
    assert sum("_quantizer " in line for line in lines) == len(dict(asymq.named_quantizers(model)))
    _check_logits(model, path)


def _check_logits(model, path):
    ids = tokens(3, 9)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    scale = model.lm_head.output_quantizer.scale_offset()[0]
    y = outputs(path, {"x": inputs})["x"]
    assert steps_between(y, logits(model, **inputs), scale) <= 4.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "encodings"], "12 bits, and version 2.0.0 knows 2, 4, 8, 16"),
        (["--format", "onnx", "--widen"], "--widen does not belong to --format onnx"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, tmp_path, monkeypatch):
    asymq.save(prepared(FAMILIES["gpt2"](n_layer=1)), tmp_path / "saved")
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path / "saved", tmp_path / "model.onnx", *arguments)
    assert message in stopped.value.code and "\n" not in stopped.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
