"""The command that compares learning rates with what steers codes, on few steps of small models."""

import csv
import json
import math
import os
import runpy
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from pictures import assert_picture

import asymq
from asymq.experiments.common import files, quickstart
from asymq.experiments.common.command import number
from asymq.experiments.transition_rate import cell, plots, results, run, table, tasks
from asymq.experiments.transition_rate.protocol import Protocol
from asymq.training.codes import coded_weights

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "transition_rate.py"
main = runpy.run_path(str(SCRIPT))["main"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _short_float_training(monkeypatch):
    monkeypatch.setattr(tasks.Digits, "float_steps", 20)


def arguments(out, *more):
    """More of them replace these."""
    short = ("--steps", 12, "--seeds", 1, "--optimizers", "sgd", "--rates", "1e-2")
    given = ("--out", out, *short, "--factors", "5e-3", "--devices", "cpu", *more)
    return [str(part) for part in given]


def result(out, name):
    return json.loads((out / f"{name}.json").read_text())


def refused(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(part) for part in given])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1, message
    return message


# ---- the runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    out = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.Digits, "float_steps", 20)
        main(arguments(out, "--optimizers", "sgd", "adam", "--rates", "1e-2", "3e-2", "--seeds", 2))
    return out


def test_files_of_a_folder(filled):
    arms = [f"{m}__{r}" for m in ("rate", "fixed", "freeze") for r in ("1e-2", "3e-2")]
    arms.append("factor__5e-3")
    runs = {
        f"digits__w2a2__{optimizer}__{arm}__seed{seed}.json"
        for optimizer in ("sgd", "adam")
        for arm in arms
        for seed in (0, 1)
    }
    pictures = {f"digits__w2a2__{optimizer}.png" for optimizer in ("sgd", "adam")}
    others = {"table.md", "table.csv", "float"}
    assert {path.name for path in filled.iterdir()} == runs | pictures | others
    for name in pictures:
        assert_picture(filled / name)


def test_a_result_says_all_about_its_run(filled):
    found = result(filled, "digits__w2a2__sgd__factor__5e-3__seed1")
    assert found["steps"] == 12 and found["settings"]["batch"] == 64
    assert found["settings"]["rate"] == "1e-2" and "threshold" not in found["settings"]
    assert 0 <= found["score"] <= 100 and 0 <= found["first_score"] <= 100
    assert found["weights"] == 2 * 128 * 128
    series = found["series"]
    assert set(series) == {"loss", "flips", "running", "target", "rate"}
    assert all(len(values) == 12 for values in series.values())
    first = 5e-3 * 2**0.5
    assert series["target"] == pytest.approx(
        [first * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(1, 13)], rel=1e-3, abs=1e-9
    )
    assert series["running"][0] == pytest.approx((first + series["flips"][0]) / 2, rel=1e-3)
    assert found["versions"]["torch"] == torch.__version__
    for when in ("before", "after"):
        assert 0.5 < sum(found["distances"][when]) <= 1.001
    frozen = result(filled, "digits__w2a2__sgd__freeze__1e-2__seed1")
    assert "frozen" in frozen["series"] and frozen["settings"]["threshold"] == 0.01


def test_seeds_have_models_and_batches_of_their_own(filled):
    runs = [result(filled, f"digits__w2a2__sgd__rate__1e-2__seed{seed}") for seed in (0, 1)]
    assert runs[0]["first_score"] != runs[1]["first_score"]
    assert runs[0]["series"]["loss"] != runs[1]["series"]["loss"]
    # Methods of a seed start alike.
    other = result(filled, "digits__w2a2__adam__factor__5e-3__seed0")
    assert other["first_score"] == runs[0]["first_score"]
    assert other["series"]["loss"][0] == runs[0]["series"]["loss"][0]


def test_differences_are_seed_by_seed(filled):
    found = [r for r in results.read_results(filled) if r["cell"].optimizer == "sgd"]
    (entries,) = results.groups(found).values()
    scores = {entry.title: [r["score"] for r in entry.results] for entry in entries}
    best = max(
        (t for t in scores if t.startswith(("rate", "fixed"))),
        key=lambda t: (statistics.fmean(scores[t]), -[*scores].index(t)),
    )
    differences = [a - b for a, b in zip(scores["factor 5e-3"], scores[best], strict=True)]
    mean = statistics.fmean(differences)
    half = 12.706 * abs(differences[0] - differences[1]) / 2
    lines = (filled / "table.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| factor")][1:]
    assert lines[0] == "## digits, w2a2, adam" and f"| {mean:+.3f} ± {half:.3f} |" in line
    assert f"| **{best}** | " in "\n".join(lines)
    with (filled / "table.csv").open() as file:
        rows = [
            r for r in csv.DictReader(file) if (r["optimizer"], r["method"]) == ("sgd", "factor")
        ]
    assert [float(row["difference"]) for row in rows] == pytest.approx(differences)


def test_intervals():
    mean, half = table.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)
    assert table.interval([2.0]) == (2.0, None)


def test_pictures(filled):
    entries = results.groups(results.read_results(filled))["digits", "w2a2", "sgd"]
    figure = plots.draw(entries)
    rates, learning, flips, near = figure.axes
    assert [len(axes.lines) for axes in (rates, learning, flips, near)] == [2, 1, 7, 8]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*(entry.title for entry in entries), "before learning"]
    plots.plt.close("all")


def test_a_second_command_only_reports(filled, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in filled.glob("*.json")}
    monkeypatch.setattr(run, "run_cell", lambda *_: pytest.fail("a run was done again"))
    monkeypatch.setattr(tasks.Digits, "make", lambda *_: pytest.fail("a model was trained again"))
    main(arguments(filled))
    assert before == {path: path.stat().st_mtime_ns for path in filled.glob("*.json")}
    assert "## digits, w2a2, sgd" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_its_run(tmp_path, monkeypatch):
    loss = tasks.Digits.loss

    def diverge(self, model, batch):
        return loss(self, model, batch) * (math.nan if torch.is_grad_enabled() else 1)

    main(arguments(tmp_path, "--methods", "fixed"))
    monkeypatch.setattr(tasks.Digits, "loss", diverge)
    main(arguments(tmp_path, "--methods", "rate", "fixed"))
    assert result(tmp_path, "digits__w2a2__sgd__rate__1e-2__seed0")["score"] is None
    table = (tmp_path / "table.md").read_text()
    assert "| rate 1e-2 | 1 of 1 diverged |" in table and "| **fixed 1e-2** |" in table


def test_devices_share_the_runs(tmp_path):
    main(arguments(tmp_path / "one", "--methods", "rate", "factor"))
    main(arguments(tmp_path / "two", "--methods", "rate", "factor", "--devices", "cpu", "cpu"))
    for arm in ("rate__1e-2", "factor__5e-3"):
        name = f"digits__w2a2__sgd__{arm}__seed0"
        one, two = (result(tmp_path / folder, name) for folder in ("one", "two"))
        assert one["score"] == two["score"] and one["series"] == two["series"]


def test_a_run_of_another_command_is_left_to_it(tmp_path, capsys):
    taken = results.Cell("digits", "w2a2", "sgd", "rate", "1e-2", 0)
    with files.lock(results.lock_path(tmp_path, taken)):
        main(arguments(tmp_path, "--methods", "rate", "fixed"))
    assert f"other commands are at 1 run: {taken}" in capsys.readouterr().out
    assert [path.stem for path in tmp_path.glob("*.json")] == [
        "digits__w2a2__sgd__fixed__1e-2__seed0"
    ]


def test_names_of_runs():
    for task in ("digits", "a__b"):
        made = results.Cell(task, "w3a8g32", "adamw", "rate", "1e-2", 11)
        assert results.Cell.named(made.name) == made and made.bits == 3
    for name in ("gpt2__beta_gamma__1e-2", "a__w2a2__sgd__nothing__1__seed0"):
        with pytest.raises(ValueError):
            results.Cell.named(name)


# ---- interruptions -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rate", "factor", "freeze"])
def test_continued_is_bit_equal(tmp_path, monkeypatch, method):
    given = ("--methods", method, "--steps", 40, "--checkpoint-every", 7)
    if method == "freeze":
        given += ("--threshold", "1e-3", "--rates", "1e-1")
    main(arguments(tmp_path / "whole", *given))
    take_step = cell.Run.take_step

    def stop(self):
        if self.step == 25:
            raise KeyboardInterrupt
        take_step(self)

    monkeypatch.setattr(cell.Run, "take_step", stop)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path / "broken", *given))
    assert stopped.value.code == 130
    (checkpoint,) = (tmp_path / "broken" / "checkpoints").glob("*.pt")
    assert torch.load(checkpoint, weights_only=True)["step"] == 21
    monkeypatch.setattr(cell.Run, "take_step", take_step)
    main(arguments(tmp_path / "broken", *given))
    assert not checkpoint.parent.exists()
    (path,) = (tmp_path / "whole").glob("*.json")
    whole, broken = (result(tmp_path / folder, path.stem) for folder in ("whole", "broken"))
    assert {k for k, v in whole.items() if v != broken[k]} <= {"seconds_per_step"}
    if method == "freeze":
        assert whole["series"]["frozen"][-1] > 0


@pytest.mark.slow
def test_killed_leaves_nothing_half_written(tmp_path):
    command = (sys.executable, SCRIPT, *arguments(tmp_path, "--steps", 4000, "--methods", "rate"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [str(part) for part in (*command, "--checkpoint-every", 5)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (checkpoint,) = tmp_path.glob("checkpoints/*.pt")
    assert torch.load(checkpoint, weights_only=True)["step"] >= 5
    assert not list(tmp_path.glob("*.json"))


# ---- what is measured --------------------------------------------------------------------------


def test_distances_by_hand():
    layer = asymq.QuantLinear(
        4, 1, False, weight=asymq.QuantSpec(2, True, full_range=True, parameterization="min_max")
    )
    layer.weight_quantizer.set_range(torch.tensor([-2.0]), torch.tensor([2.0]))
    assert layer.weight_quantizer.scale_offset()[0].item() == 1
    with torch.no_grad():
        # The grid is -2 to 1, with transition points at -1.5, -0.5 and 0.5.
        layer.weight.copy_(torch.tensor([[-1.49, 0.02, 0.76, 9.0]]))
    found = cell.distances(list(coded_weights(layer)))
    expected = [0.0] * cell.BINS
    expected[0] = expected[10] = 0.25  # 0.01, 0.26
    expected[19] = 0.25  # 0.48; 8.5 is in none
    assert found == expected


def test_weights_start_at_the_range_of_least_error():
    spec = asymq.QuantSpec(2, True, asymq.PerGroup(64), full_range=True)
    layer = asymq.QuantLinear(128, 8, False, weight=spec)
    torch.nn.init.normal_(layer.weight)

    def error():
        return (layer.weight_quantizer(layer.weight) - layer.weight).square().sum().item()

    low, high = layer.weight_quantizer.extrema(layer.weight.detach())
    layer.weight_quantizer.set_range(low, torch.maximum(-low, high))
    widest = error()
    tasks._narrow(layer.weight_quantizer, layer.weight)
    assert error() < 0.95 * widest


def test_shifted_digits_are_a_function_of_seed_and_step(tmp_path):
    task = tasks.open_task("digits", Protocol(), None, tmp_path)
    cpu = torch.device("cpu")
    one, two = task.batch(3, 1, cpu), task.batch(3, 1, cpu)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], task.batch(4, 1, cpu)[0])
    assert not torch.equal(one[0], task.batch(3, 2, cpu)[0])


def test_a_convolutional_net_has_float_ends(tmp_path):
    task = tasks.open_task("digits-conv", Protocol(), None, tmp_path)
    task.make([0])
    model = task.quantized(2, 0)
    quantizers = [q.kind for _, q in asymq.named_quantizers(model)]
    assert quantizers.count("weight") == quantizers.count("activation") == 3
    for end in (model[0], model[-1]):
        assert type(end) in (torch.nn.Conv2d, torch.nn.Linear)  # not a quantized layer
    main(arguments(tmp_path, "--task", "digits-conv", "--steps", 2, "--methods", "factor"))
    assert result(tmp_path, "digits-conv__w2a2__sgd__factor__5e-3__seed0")["weights"] > 10_000


# ---- language models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with `gpt2`, `llama` and `text`."""
    folder = tmp_path_factory.mktemp("models")
    content = quickstart.read_topics()[0]
    (folder / "text").mkdir()
    (folder / "text" / "wiki.train.raw").write_text(content[:20_000])
    (folder / "text" / "wiki.test.raw").write_text(content[20_000:21_000])
    tokenizer = quickstart.train_tokenizer(content[:20_000], vocabulary=300)
    for name, make in (("gpt2", tiny_models.gpt2), ("llama", tiny_models.DECODERS["llama"])):
        make(vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def of_language(world, out, name, *more):
    short = ("--batch", 2, "--context", 16, "--evaluate", 4, "--optimizers", "adamw", "--steps", 3)
    return arguments(out, "--task", world / name, "--data", world / "text", *short, *more)


def test_a_language_model_in_groups_with_ranges_of_tokens(world, tmp_path):
    grouped = ("--bits", 2, 3, "--group", 16, "--activations", "token")
    main(of_language(world, tmp_path, "llama", *grouped, "--methods", "rate", "factor"))
    for bits in (2, 3):
        found = result(tmp_path, f"llama__w{bits}a8g16__adamw__factor__5e-3__seed0")
        assert found["settings"]["group"] == 16 and found["settings"]["activations"] == "token"
        assert found["settings"]["context"] == 16 and found["settings"]["model_sha256"]
        assert found["score"] > 0 and not found["higher_is_better"]
    heads = [line for line in (tmp_path / "table.md").read_text().splitlines() if "##" in line]
    assert heads == ["## llama, w2a8g16, adamw", "## llama, w3a8g16, adamw"]


def test_a_language_model_whose_every_output_is_quantized(world, tmp_path):
    main(of_language(world, tmp_path, "gpt2", "--methods", "freeze"))
    found = result(tmp_path, "gpt2__w2a8__adamw__freeze__1e-2__seed0")
    assert found["metric"] == "loss, nats a token" and "frozen" in found["series"]


def test_text_is_the_quick_starts_model(tmp_path, monkeypatch, world):
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "gpt2-topics").parent.mkdir(parents=True, exist_ok=True)
        (folder / "gpt2-topics").symlink_to(world / "gpt2")

    monkeypatch.setattr(quickstart, "make", make)
    given = ("--task", "text", "--batch", 2, "--context", 16, "--evaluate", 2, "--steps", 2)
    for _ in range(2):
        main(arguments(tmp_path, *given, "--optimizers", "adamw", "--methods", "rate"))
    assert calls == [tmp_path / "float"]
    assert len(list(tmp_path.glob("*.json"))) == 1


# ---- bad input ---------------------------------------------------------------------------------

BAD = {
    "task": (("--task", "./nothing"), "no such folder"),
    "digits in groups": (("--group", 4), "--task digits: has --activations input and no --group"),
    "text of digits": (("--data", "."), "--data .: --task digits has no text"),
    "optimizer": (("--optimizers", "lion"), "lion"),
    "method": (("--methods", "luck"), "luck"),
    "bits": (("--bits", 1), "argument --bits: must be an integer from 2 to 16, got '1'"),
    "factor": (("--factors", 2), "must be below 1, got '2'"),
    "threshold": (("--threshold", 0), "must be a positive number, got '0'"),
    "rate": (("--rates", "fast"), "must be a positive number, got 'fast'"),
    "steps": (("--steps", 0), "at least 1"),
    "seeds": (("--seeds", 32), "--seeds: must be an integer from 1 to 31"),
    "device": (("--devices", "cuda:99"), "no such device"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path, capsys, name):
    given, expected = BAD[name]
    assert expected in refused(arguments(tmp_path / "out", *given), capsys)
    assert not (tmp_path / "out").exists()


def test_bad_input_of_language_models(world, tmp_path, capsys):
    out = tmp_path / "out"
    message = refused(of_language(world, out, "gpt2", "--group", 24), capsys)
    assert "--task" in message and "groups of 24" in message
    assert "2 to 32" in refused(of_language(world, out, "gpt2", "--context", 99), capsys)
    assert "wiki.train.raw" in refused(of_language(world, out, "gpt2", "--data", "./no"), capsys)


def test_a_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").touch()
    assert "is a file, not a folder" in refused(arguments(tmp_path / "out"), capsys)


def test_results_of_other_settings_are_refused(filled, capsys):
    message = refused(arguments(filled, "--steps", 13), capsys)
    assert "was made with steps 12, not 13" in message


def test_a_damaged_result_is_named(tmp_path, capsys):
    path = tmp_path / "digits__w2a2__sgd__rate__1e-2__seed0.json"
    path.write_text("{")
    assert f"{path}: is not a result" in refused(arguments(tmp_path), capsys)


@pytest.mark.parametrize("text", ["0.01", "1e-2", "10e-3", ".010"])
def test_spellings_of_a_number_are_one(text):
    assert number(text) == "1e-2"
    assert number("2.5e-3") == "2.5e-3" and number("3") == "3e0"
