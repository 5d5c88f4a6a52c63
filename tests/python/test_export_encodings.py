"""Encodings of AIMET and QNN beside float ONNX, read by hand and, where it is, by AIMET."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import asymq
from asymq import PerGroup, QuantAct, QuantConfig, QuantSpec
from asymq.__main__ import main
from asymq.export.grids import Grid

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from onnx_session import outputs  # noqa: E402
from tiny_models import DECODERS, FAMILIES, logits, prepared, tokens  # noqa: E402

W4A8 = QuantConfig.table2("min_max", weight_bits=4, activation_bits=8)


def read(path):
    """Entries by name, and the graph's tensors: constants and the names of all others."""
    file = onnx.load(path)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in file.graph.initializer}
    others = {name for node in file.graph.node for name in node.output}
    others |= {value.name for value in file.graph.input}
    return json.loads(path.with_suffix(".encodings").read_text()), constants, others


def test_a_language_model(tmp_path, monkeypatch, capsys):
    model = prepared(FAMILIES["gpt2"](n_layer=1), W4A8)
    path = tmp_path / "model.onnx"
    report = asymq.export_encodings(model, tokens(2, 6), path)
    assert report.files == (path, tmp_path / "model.encodings")
    content, constants, others = read(path)
    # The command does the same.
    asymq.save(model, tmp_path / "saved")
    given = [str(tmp_path / "saved"), str(tmp_path / "other.onnx"), "--format", "encodings"]
    monkeypatch.setattr(sys, "argv", ["asymq", "export", *given, "--length", "6"])
    main()
    assert capsys.readouterr().out.splitlines()[:-2] == str(report).splitlines()[:-2]
    assert read(tmp_path / "other.onnx")[0] == content
    assert content["version"] == "2.0.0"
    assert content["producer"] == {"package": "asymq", "version": asymq.__version__}
    entries = {entry["name"]: entry for entry in content["encodings"]}
    assert len(entries) == len(content["encodings"])
    assert entries.keys() <= constants.keys() | others
    assert not {"QuantizeLinear", "DequantizeLinear", "Clip"} & {
        node.op_type for node in onnx.load(path).graph.node
    }

    quantizers = dict(asymq.named_quantizers(model))
    assert [row.name for row in report.rows] == list(quantizers)
    for row in report.rows:
        grid, names = Grid.of(quantizers[row.name]), row.tensor.split(", ")
        written = [name for name in names if name in entries]
        assert written or "without encoding" in row.note
        for name in written:
            entry = entries[name]
            assert entry["output_dtype"] == row.container
            assert np.array_equal(np.ravel(entry["y_scale"]), grid.scale.flatten().numpy())
            zero_point = np.ravel(entry.get("y_zero_point", 0))
            assert (zero_point == row.zero_point.flatten().numpy()).all()
            assert ("axis" in entry) == (row.kind == "weight")
    # An embedding table has no encoding, the head that is tied to it has its own initializer.
    assert "transformer.wte.weight" in constants and "transformer.wte.weight" not in entries
    assert entries["lm_head.weight"]["output_dtype"] == "int4"
    # Attention's context is what its heads are before their elements are moved.
    nodes = onnx.load(path).graph.node
    (product,) = (node for node in nodes if "transformer.h.0.attn.context" in node.output)
    assert product.op_type == "MatMul"
    # The last activation bears the output's name.
    assert "logits" in entries and entries["logits"]["output_dtype"] == "uint8"

    # The file itself computes in float, its weights on their grids.
    for quantizer in quantizers.values():
        if isinstance(quantizer, QuantAct):
            quantizer.state = "off"
    ids = tokens(3, 9, seed=5)
    y = outputs(path, {"x": {"input_ids": ids}})["x"]
    torch.testing.assert_close(y, logits(model, ids), atol=2e-5, rtol=2e-5)


# ---- formats, on a model that is quickly traced --------------------------------------------------


class Net(nn.Module):
    """x is quantized twice by itself, and once after its elements were moved."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.one, self.other = QuantAct(QuantSpec(8)), QuantAct(QuantSpec(4))
        self.moved = QuantAct(QuantSpec(8))

    def forward(self, x):
        y = self.norm(x)
        y = self.one(y) + self.second(self.first(self.other(y)))
        return self.moved(y.transpose(-1, -2))


def net(weight=None, activation_bits=8):
    model = Net()
    with torch.no_grad():
        model.norm.weight.add_(0.3 * torch.randn(8))
    weight = weight or QuantSpec(4, symmetric=True, granularity=asymq.PerChannel())
    asymq.prepare(model, QuantConfig(weight, QuantSpec(activation_bits), QuantSpec(8)))
    x = torch.randn(5, 3, 8)
    asymq.calibrate(model, [x])
    return model.eval(), x


def entry_of(content, name):
    if content["version"] == "2.0.0":
        return next(e for e in content["encodings"] if e["name"] == name)
    kinds = content["activation_encodings"], content["param_encodings"]
    if content["version"] == "0.6.1":
        return next(kind[name] for kind in kinds if name in kind)
    return next(e for kind in kinds for e in kind if e["name"] == name)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Files of every version of one model, and the model."""
    torch.manual_seed(0)
    model, x = net()
    folder, contents = tmp_path_factory.mktemp("encodings"), {}
    for version in ("2.0.0", "1.0.0", "0.6.1"):
        path = folder / f"{version}.onnx"
        asymq.export_encodings(model, x, path, version=version)
        contents[version] = read(path)
    return model, x, contents, folder


def test_versions(written):
    model, _, contents, _ = written
    grid = Grid.of(model.first.output_quantizer)
    s, n = grid.scale.item(), grid.lowest.item()
    assert entry_of(contents["2.0.0"][0], "first.output") == {
        "name": "first.output",
        "output_dtype": "uint8",
        "y_scale": s,
        "y_zero_point": -n,
    }
    assert entry_of(contents["1.0.0"][0], "first.output") == {
        "name": "first.output",
        "dtype": "INT",
        "enc_type": "PER_TENSOR",
        "bw": 8,
        "is_sym": False,
        "scale": [s],
        "offset": [n],
    }
    (entry,) = entry_of(contents["0.6.1"][0], "first.output")
    assert entry == {
        "bitwidth": 8,
        "dtype": "int",
        "is_symmetric": "False",
        "scale": s,
        "offset": n,
        "min": s * n,
        "max": s * (n + 255),
    }
    assert contents["1.0.0"][0]["excluded_layers"] == []


def test_weights(written):
    """Symmetric codes are counted from -8; the file's matrix is [in, out]."""
    model, _, contents, _ = written
    scale = Grid.of(model.first.weight_quantizer).scale.flatten().tolist()
    new = entry_of(contents["2.0.0"][0], "first.weight")
    assert new == {"name": "first.weight", "output_dtype": "int4", "y_scale": scale, "axis": 1}
    old = entry_of(contents["1.0.0"][0], "first.weight")
    assert (old["enc_type"], old["bw"], old["is_sym"]) == ("PER_CHANNEL", 4, True)
    assert old["scale"] == scale and old["offset"] == [-8] * 12
    for _, constants, _ in contents.values():
        codes = constants["first.weight"] / np.array(scale, dtype=np.float32)
        assert np.abs(codes - codes.round()).max() < 1e-5 and np.abs(codes).max() < 7.5


def test_every_entry_is_a_tensor_of_its_own(written):
    """A tensor that two quantizers read is multiplied by one for each; what is moved is quantized
    before."""
    _, x, contents, folder = written
    for version, (_, constants, others) in contents.items():
        assert {"one", "other", "moved"} <= others, version
        made = {
            name: node.op_type
            for node in onnx.load(folder / f"{version}.onnx").graph.node
            for name in node.output
        }
        assert (made["one"], made["other"], made["moved"]) == ("Mul", "Mul", "Add")
        assert constants["asymq.one"] == 1
    assert outputs(folder / "2.0.0.onnx", {"x": {"x": x}})["x"].shape == (5, 8, 3)


def test_a_norm_whose_range_lies_beside_zero(written):
    model, _, contents, _ = written
    grid = Grid.of(model.norm.weight_quantizer)
    entry = entry_of(contents["2.0.0"][0], "norm.weight")
    assert grid.lowest > 0 and "y_zero_point" not in entry
    assert entry["output_dtype"] == grid.container(constant=True).dtype == "uint16"


def test_groups(tmp_path):
    model, x = net(QuantSpec(4, symmetric=True, granularity=PerGroup(4)))
    scale = Grid.of(model.first.weight_quantizer).scale
    path = tmp_path / "model.onnx"
    asymq.export_encodings(model, x, path)
    entry = entry_of(read(path)[0], "first.weight")
    assert (entry["axis"], entry["block_size"]) == (0, 4)
    assert entry["y_scale"] == scale.t().tolist()
    asymq.export_encodings(model, x, path, version="1.0.0")
    entry = entry_of(read(path)[0], "first.weight")
    assert (entry["enc_type"], entry["block_size"]) == ("PER_BLOCK", 4)
    assert entry["scale"] == scale.flatten().tolist()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"first\.weight has ranges in groups, .* 0\.6\.1"):
        asymq.export_encodings(model, x, path, version="0.6.1")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_twelve_bits(tmp_path):
    model, x = net(activation_bits=12)
    path = tmp_path / "model.onnx"
    message = r"12 bits, and version 2\.0\.0 knows 2, 4, 8, 16: .*1\.0\.0.*widen=True"
    with pytest.raises(ValueError, match=message):
        asymq.export_encodings(model, x, path)
    assert not list(tmp_path.iterdir())
    report = asymq.export_encodings(model, x, path, widen=True)
    rows = {row.name: row for row in report.rows}
    assert rows["first.output_quantizer"].note == "widened to 16 bits"
    assert not rows["one"].note
    entry = entry_of(read(path)[0], "first.output")
    low, high = (end.item() for end in model.first.output_quantizer.bounds())
    step = Grid.of(model.first.output_quantizer).scale.item()
    assert entry["output_dtype"] == "uint16"
    assert abs(-entry["y_zero_point"] * entry["y_scale"] - low) < step
    assert abs((65535 - entry["y_zero_point"]) * entry["y_scale"] - high) < step


def test_refusals(tmp_path):
    model, x = net()
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=r"version must be one of 2\.0\.0, 1\.0\.0, 0\.6\.1"):
        asymq.export_encodings(model, x, path, version="3")
    with pytest.raises(ValueError, match="path must be that of the ONNX file"):
        asymq.export_encodings(model, x, tmp_path / "model.encodings")
    model.one.set_range(torch.tensor([0.5]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"one: its range lies on one side of 0.*force_zero"):
        asymq.export_encodings(model, x, path)
    assert not list(tmp_path.iterdir())


# ---- AIMET itself --------------------------------------------------------------------------------

AIMET = os.environ.get("ASYMQ_AIMET_PYTHON")
LOAD = """
import sys
import numpy as np, onnx, onnxruntime as ort
from aimet_onnx.quantsim import QuantizationSimModel, encodings_to_onnx_qdq, load_encodings_to_sim
how, path, encodings, given, made = sys.argv[1:]
if how == "qdq":
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = encodings_to_onnx_qdq(onnx.load(path), encodings)
    session = ort.InferenceSession(model.SerializeToString(), options)
else:
    sim = QuantizationSimModel(onnx.load(path))
    load_encodings_to_sim(sim, encodings, strict=False, disable_missing_quantizers=True)
    session = sim.session
np.save(made, session.run(None, {"input_ids": np.load(given)})[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not AIMET, reason="ASYMQ_AIMET_PYTHON names no Python with aimet-onnx")
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize(
    ("how", "version", "bits", "widen"),
    [
        ("qdq", "2.0.0", 8, False),
        ("sim", "2.0.0", 8, False),
        ("sim", "1.0.0", 12, False),
        ("sim", "0.6.1", 12, False),
        ("qdq", "2.0.0", 12, True),
    ],
)
def test_aimet_computes_the_same(family, how, version, bits, widen, tmp_path):
    """Short rows: an early value that another order of adding moves to the next code changes all
    that attends to it."""
    make = (FAMILIES | {"llama": DECODERS["llama"]})[family]
    config = QuantConfig.table2("min_max", activation_bits=bits)
    model = prepared(make(), config)
    path = tmp_path / "model.onnx"
    asymq.export_encodings(model, tokens(2, 6), path, version=version, widen=widen)
    ids = tokens(64, 3, seed=9)
    given, made = tmp_path / "given.npy", tmp_path / "made.npy"
    np.save(given, ids.numpy())
    command = [AIMET, "-c", LOAD, how, path, path.with_suffix(".encodings"), given, made]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    y, expected = torch.from_numpy(np.load(made)), logits(model, ids)
    step = model.lm_head.output_quantizer.scale_offset()[0]
    difference = (y - expected).abs() / step
    assert difference.max() <= (1.5 if bits == 8 else 16)
    if widen:  # onto finer grids: nothing is equal, and all is near
        assert difference.median() <= 1.5
    else:
        assert (y == expected).flatten(1).all(1).float().mean() >= 0.5
