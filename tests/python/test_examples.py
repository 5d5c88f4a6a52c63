"""Every example under scripts/examples, on a tiny model from disk; what they print must improve."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import asymq

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"
TEXT = "".join(f"{n} and {n} are {2 * n}, " for n in range(400))


def write_tokenizer(folder, special):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=special))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """What an example of language models is given: a folder and a text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    words = write_tokenizer(folder, ["[UNK]", "[PAD]"])
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=1,
        )
    ).save_pretrained(folder)
    (folder / "train.txt").write_text(TEXT)
    return ["--model", folder, "--text", folder / "train.txt", "--length", 32, "--batch", 4]


def run(name, *arguments, monkeypatch, capsys):
    """What the example prints."""
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def assert_falls(output, word):
    values = [float(x) for x in re.findall(rf"{word} +([-+.\w]+)", output)]
    assert len(values) > 1 and values[-1] < values[0], output


@pytest.mark.parametrize(
    "name, word", [("own_loop.py", "loss"), ("distillation.py", "KL to the float model")]
)
def test_loops(name, word, llama, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    output = run(name, *llama, "--steps", 40, "--out", out, monkeypatch=monkeypatch, capsys=capsys)
    assert_falls(output, word)
    assert all(q.calibrated for _, q in asymq.named_quantizers(asymq.load(out)))


def test_notebook(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    for needed in ("ipykernel", "matplotlib", "sklearn"):
        pytest.importorskip(needed)
    import nbformat

    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", nbformat.NO_CONVERT)
    resources = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    found = dict(re.findall(r"(\w+): ([\d.]+)%", text))
    assert float(found["learned"]) > float(found["calibrated"])
    assert found["loaded"] == found["learned"]
    assert any("image/png" in output.get("data", ()) for output in outputs)


def test_log(llama, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [*llama, "--steps", 31, "--out", tmp_path / "out", "--log", tmp_path / "log"]
    run("own_loop.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    log = EventAccumulator(str(tmp_path / "log")).Reload()
    high = log.Scalars("range/model.layers.0.mlp.gate_proj.weight_quantizer/high")
    assert [entry.step for entry in high] == [0, 10, 20, 30]
    assert high[0].value != high[-1].value


def test_trainer(llama, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    pytest.importorskip("accelerate")
    arguments = [*llama, "--steps", 21, "--out", tmp_path / "out"]
    output = run("trainer.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    losses = [float(x) for x in re.findall(r"'loss': '?([.\d]+)", output)]
    assert losses[-1] < losses[0], output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(q.calibrated for _, q in asymq.named_quantizers(model))


def test_fsdp2(llama, tmp_path):
    pytest.importorskip("accelerate")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    arguments = [*llama, "--steps", 21, "--lr", 1e-2, "--out", tmp_path / "out"]
    result = subprocess.run(
        [*torchrun, EXAMPLES / "fsdp2.py", *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert_falls(result.stdout, "loss")
    assert isinstance(asymq.load(tmp_path / "out"), torch.nn.Module)


def test_classifier(tmp_path, monkeypatch, capsys):
    from transformers import BertConfig, BertForSequenceClassification

    words = write_tokenizer(tmp_path, ["[UNK]", "[PAD]"])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    rows = [f"{n % 2},{n} {'and' if n % 2 else 'are'} {n}\n" for n in range(64)]
    (tmp_path / "data.csv").write_text("".join(rows))
    arguments = ["--model", tmp_path, "--data", tmp_path / "data.csv", "--out", tmp_path / "out"]
    output = run("classifier.py", *arguments, "--epochs", 8, monkeypatch=monkeypatch, capsys=capsys)
    accuracies = [float(x) for x in re.findall(r"accuracy ([.\d]+)%", output)]
    assert accuracies[-1] > accuracies[0] or accuracies[-1] == 100, output
    assert (tmp_path / "out" / "asymq.json").exists()


def test_vision(tmp_path, monkeypatch, capsys):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=2,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    labels = torch.arange(128) % 2
    images = torch.randn(128, 3, 16, 16) + labels.view(-1, 1, 1, 1)
    torch.save((images, labels), tmp_path / "images.pt")
    arguments = ["--model", tmp_path, "--data", tmp_path / "images.pt", "--out", tmp_path / "out"]
    output = run("vision.py", *arguments, "--epochs", 8, monkeypatch=monkeypatch, capsys=capsys)
    accuracies = [float(x) for x in re.findall(r"accuracy ([.\d]+)%", output)]
    assert len(accuracies) == 3 and accuracies[2] > max(accuracies[:2]), output


def test_onnx_export(tmp_path, monkeypatch, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64, "vocab_size": 64}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None))
    asymq.prepare(model, asymq.QuantConfig.table2("beta_gamma", weight_bits=8, activation_bits=8))
    asymq.calibrate(model, [torch.randint(64, (4, 64))])
    asymq.save(model, tmp_path / "saved")
    arguments = ["--model", tmp_path / "saved", "--out", tmp_path / "model.onnx"]
    output = run("onnx_export.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    equal, largest = re.search(r"equal logits ([.\d]+)%, largest difference (\S+)", output).groups()
    assert float(equal) > 90 and float(largest) < 0.1, output


def test_attention(tmp_path):
    prefix = subprocess.check_output(
        [sys.executable, "-m", "asymq", "--cmake-prefix-path"], text=True
    ).strip()
    configure = ["cmake", "-S", EXAMPLES / "attention", "-B", tmp_path]
    options = [f"-DCMAKE_PREFIX_PATH={prefix}", f"-DPython3_EXECUTABLE={sys.executable}"]
    for command in (
        [*configure, "-DCMAKE_BUILD_TYPE=Release", *options],
        ["cmake", "--build", tmp_path],
        [tmp_path / "attention"],
    ):
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
    assert_falls(result.stdout, "loss")


def test_examples_are_short_and_tested():
    tests = Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        source = (path / "main.cpp" if path.is_dir() else path).read_text()
        if path.suffix == ".ipynb":
            cells = [cell for cell in json.loads(source)["cells"] if cell["cell_type"] == "code"]
            source = "\n".join("".join(cell["source"]) for cell in cells)
        assert len(source.splitlines()) < 80, path
        if not path.is_dir():
            assert f'"{path.name}"' in tests, path
