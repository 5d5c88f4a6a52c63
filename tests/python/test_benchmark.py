"""The command that measures: what it writes, and comparing with what is recorded."""

import csv
import itertools
import runpy
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from asymq.experiments.benchmark import ops, profile, recipes, recorded, step
from asymq.experiments.benchmark.timing import Timing, timing
from asymq.experiments.common.recipes import Recipe

ROOT = Path(__file__).parents[2]
script = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))
main = script["main"]
OPS = ("ops", "--device", "cpu", "--threads", "1", "--only", "copy,asymq")
RECIPES = ("step", "--device", "cpu", "--threads", "1", "--model", "llama-1b", "--recipe", "w4a8")
STEP = ("step", "--device", "cpu", "--threads", "1", "--only", "float_eager,asymq")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One case of operators, a model of one layer, and next to no time for each."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    case = ops.Case("tensor", (64,), torch.float32, "cpu")
    monkeypatch.setattr(ops, "cases", lambda *_: [case])
    monkeypatch.setattr(ops, "_use_memory", lambda: None)
    monkeypatch.setattr(ops, "median_seconds", lambda sample, span: sample())
    monkeypatch.setattr(step, "timing", lambda sample, span: Timing(sample(), 0.0))
    tiny = step.Setting("gpt2", 1, 8, 2, 32, batch=1, context=8)
    monkeypatch.setitem(step.MODELS, "quickstart", tiny)
    llama = step.LlamaSetting(
        *("llama", 1, 32, 4, 32), batch=1, context=8, kv_heads=2, intermediate=64
    )
    monkeypatch.setitem(step.MODELS, "llama-1b", llama)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def run(command, out, *more):
    main([*command, "--out", str(out), *map(str, more)])


def rows(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def refused(command, out, capsys, *more):
    """The one line of an error with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(command, out, *more)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmark.py") and error.count("\n") == 1
    return error


AIMET = (*OPS[:-1], "copy,aimet_asymq,aimet_triton,aimet_torch")


def test_aimet_says_that_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aimet_torch.quantization", None)
    run(AIMET, tmp_path)
    assert {row["method"] for row in rows(tmp_path / "ops_cpu.csv")} == {"copy"}
    text = (tmp_path / "ops_cpu.md").read_text()
    for method in AIMET[-1].split(",")[1:]:
        assert f"- {method}: not installed: " in text


@pytest.mark.skipif(not find_spec("aimet_torch"), reason="aimet-torch is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("granularity", ["tensor", "axis0", "last_axis", "groups"])
def test_aimets_backends_are_rows(granularity, tmp_path, monkeypatch):
    """Triton's where there is a GPU."""
    case = ops.Case(granularity, (4, 256), torch.bfloat16, "cpu")
    monkeypatch.setattr(ops, "cases", lambda *_: [case])
    run(AIMET, tmp_path)
    measured = {(row["method"], row["measure"]) for row in rows(tmp_path / "ops_cpu.csv")}
    assert {("aimet_asymq", "both"), ("aimet_torch", "both")} <= measured
    assert "aimet-torch 2." in (tmp_path / "ops_cpu.md").read_text()


def test_results_of_record_are_not_written_over(monkeypatch):
    """Without --out nothing of the checkout but its build folder is written to."""
    found = []
    monkeypatch.setattr(ops, "run", lambda args: found.append(args.out))
    main(list(OPS))
    assert found == [ROOT / "build" / "benchmark"]


def test_ops(tmp_path):
    run(OPS, tmp_path)
    found = rows(tmp_path / "ops_cpu.csv")
    assert [(row["method"], row["measure"]) for row in found] == [
        ("copy", "both"),
        *(("asymq", measure) for measure in ops.MEASURES),
    ]
    assert all(float(row["milliseconds"]) > 0 for row in found)
    assert "| float32 | tensor | 64 | asymq | eager |" in (tmp_path / "ops_cpu.md").read_text()


def test_codes(tmp_path):
    run((*OPS[:-1], "copy,quantize,update_codes"), tmp_path)
    found = rows(tmp_path / "ops_cpu.csv")
    expected = [("copy", "both"), ("quantize", "forward"), ("update_codes", "forward")]
    assert [(row["method"], row["measure"]) for row in found] == expected


def test_steps_that_learn_otherwise(tmp_path):
    methods = ["float_eager", "float_sdpa", "asymq_distilled"]
    methods += ["asymq_joint", "asymq_weights", "asymq_scheduled"]
    run((*STEP[:-1], ",".join(methods)), tmp_path, "--precision", "float32")
    found = rows(tmp_path / "step_cpu.csv")
    assert [row["method"] for row in found] == methods
    fastest = min(float(row["milliseconds"]) for row in found[:2])
    for row in found:
        assert float(row["ratio"]) == pytest.approx(float(row["milliseconds"]) / fastest, rel=1e-2)


def test_timing():
    assert timing(lambda: 2.0, 1e-3) == Timing(2.0, 0.0)
    samples = itertools.cycle([1.0, 2.0, 3.0])
    found = timing(lambda: next(samples), 0.02)
    assert found.seconds == 2.0 and found.spread == pytest.approx(1.0, abs=0.05)


def test_step(tmp_path):
    run(STEP, tmp_path, "--profile")
    found = rows(tmp_path / "step_cpu.csv")
    assert list(found[0]) == [
        *("device", "precision", "method", "milliseconds", "ratio", "peak_gib", "spread")
    ]
    assert [(row["precision"], row["method"]) for row in found] == [
        (precision, method)
        for precision in ("float32", "bfloat16")
        for method in ("float_eager", "asymq")
    ]
    assert found[0]["ratio"] == "1.0" and found[0]["peak_gib"] == ""
    text = (tmp_path / "step_cpu.md").read_text()
    assert "## asymq, bfloat16" in text and "| fake-quantize |" in text


def test_by_default_a_cpu_has_what_needs_no_gpu(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(step, "run", lambda args: ran.extend(args.only))
    run(STEP[:-2], tmp_path)
    assert ran == [name for name in step.METHODS if not name.endswith("captured")]
    for method in ("asymq_captured", "asymq_joint_captured"):
        message = refused((*STEP[:-1], f"asymq,{method}"), tmp_path, capsys)
        assert f"--only {method}: is a CUDA graph, which needs a GPU" in message
    message = refused(STEP, tmp_path, capsys, "--precision", "tf32,bfloat16")
    assert "--precision tf32: is a GPU's alone; the CPU has float32" in message


def test_without_a_float_model_there_is_no_ratio(tmp_path):
    run((*STEP[:-1], "asymq,asymq_joint,asymq_weights"), tmp_path, "--precision", "bfloat16")
    assert [row["ratio"] for row in rows(tmp_path / "step_cpu.csv")] == [""] * 3
    text = (tmp_path / "step_cpu.md").read_text()
    assert "nan" not in text and "range learning" not in text
    for method, learns in (("asymq", "ranges"), ("asymq_joint", "joint")):
        assert f"| bfloat16 | {method} | {learns} | " in text


@pytest.mark.parametrize("command", [STEP, RECIPES])
def test_too_little_memory_is_a_row(command, tmp_path, monkeypatch):
    """That the rows before it survive, and that comparing leaves out."""
    module, calls = (recipes, []) if command is RECIPES else (step, [])
    measure = step.measure

    def too_little(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("too little")
        return measure(*args)

    monkeypatch.setattr(module, "measure", too_little)
    more = ("--only", "float_sdpa,recipes", "--recipe", "w4a8", "w8a8") if module is recipes else ()
    only = ("--only", "float_eager,asymq,asymq_joint", "--precision", "float32")
    run(command, tmp_path, *(more or only))
    (file,) = tmp_path.glob("*.csv")
    first, lost, last = rows(file)
    assert float(first["milliseconds"]) > 0 and float(last["milliseconds"]) > 0
    assert (lost["milliseconds"], lost["peak_gib"]) == ("", "out of memory")
    assert "| out of memory |" in file.with_suffix(".md").read_text()
    run(command, tmp_path / "now", *(more or only), "--against", file)
    assert "Not in " in (tmp_path / "now" / file.name).with_suffix(".md").read_text()


@pytest.mark.parametrize("command", [STEP, RECIPES, OPS])
def test_what_is_measured_outlives_an_interruption(command, tmp_path, monkeypatch):
    module = {"ops": ops, "step": step}[command[0]]
    if command is RECIPES:
        module, command = recipes, (*RECIPES, "--only", "float_sdpa,recipes")
    name = "measure_case" if module is ops else "measure"
    measure, calls = getattr(module, name), []
    case = ops.Case("tensor", (64,), torch.float32, "cpu")
    monkeypatch.setattr(ops, "cases", lambda *_: [case, case])

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(SystemExit) as end:
        run(command, tmp_path)
    assert end.value.code == 130
    (file,) = tmp_path.glob("*.csv")
    assert rows(file) and file.with_suffix(".md").exists()


def test_recipes(tmp_path):
    more = (
        "--recipe",
        "w4a8",
        "w4a8:cache=8",
        "--only",
        "float_sdpa,recipes",
        "--generate",
        "--profile",
    )
    run(RECIPES, tmp_path, *more)
    found = rows(tmp_path / "recipes_cpu_llama-1b.csv")
    methods = ("float_sdpa", "w4a8:group=32", "w4a8:group=32,cache=8")
    assert [(row["precision"], row["what"], row["method"]) for row in found] == [
        ("bfloat16", what, method) for what in ("step", "generate") for method in methods
    ]
    # Of a step all tokens of the batch, of generating the new ones.
    for row, tokens in zip(found, [8] * 3 + [4] * 3, strict=True):
        expected = 1e3 * tokens / float(row["milliseconds"])
        assert float(row["tokens_per_second"]) == pytest.approx(expected, rel=0.01)
        assert float(row["times_float_sdpa"]) > 0 and row["times_float_compiled"] == ""
    text = (tmp_path / "recipes_cpu_llama-1b.md").read_text()
    assert "| bfloat16 | generate | w4a8:group=32 |" in text
    assert "## step, w4a8:group=32,cache=8, bfloat16" in text


def test_both_ratios_are_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    run(RECIPES, tmp_path)
    found = rows(tmp_path / "recipes_cpu_llama-1b.csv")
    assert [row["method"] for row in found] == ["float_sdpa", "float_compiled", "w4a8:group=32"]
    plain, compiled, own = (float(row["milliseconds"]) for row in found)
    assert float(found[2]["times_float_sdpa"]) == pytest.approx(own / plain, abs=1e-3)
    assert float(found[2]["times_float_compiled"]) == pytest.approx(own / compiled, abs=1e-3)


def test_a_step_of_a_recipe_learns_weights_and_ranges():
    setting = step.MODELS["llama-1b"]
    args = Namespace(device="cpu", checkpointing=False)
    model = recipes.model_of(Recipe.parse("w4a8"), setting, args, torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    work = recipes.training_step(model, recipes.tokens(setting, "cpu"), compiled=False)
    work()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    ranges = {name for name in before if name.endswith((".beta", ".gamma"))}
    weights = {name for name in before if name.endswith("proj.weight")}
    assert len(ranges) > 10 and len(weights) == 7 and ranges | weights <= moved
    assert {before[name].dtype for name in ranges} == {torch.float32}
    assert {before[name].dtype for name in weights} == {torch.bfloat16}


@pytest.mark.parametrize("command, name", [(OPS, "ops_cpu"), (STEP, "step_cpu")])
def test_against_an_earlier_run(command, name, tmp_path, capsys):
    run(command, tmp_path / "then")
    file = tmp_path / "then" / f"{name}.csv"
    run(command, tmp_path / "now", "--against", file)
    report = (tmp_path / "now" / f"{name}.md").read_text()
    comparison = report[report.index(f"## Against {name}.csv") :]
    assert comparison in capsys.readouterr().out
    assert comparison.count("| ") and "Not in" not in comparison
    assert all(f"| {', '.join(key)} |" in comparison for key in keys(file))


def keys(file):
    """What the rows are of, without the device."""
    return [list(row.values())[1 : list(row).index("milliseconds")] for row in rows(file)]


def test_comparison():
    def row(method, milliseconds):
        return step.StepTime("cpu", "tf32", method, milliseconds, 1.0, None, 0.0)

    then = {recorded.key(row(method, 1.0)): 2.0 for method in ("float_eager", "asymq")}
    against = recorded.Recorded(Path("old.csv"), ["a machine"], then)
    text = recorded.comparison([row("asymq", 3.0), row("reference", 9.0)], against)
    assert "- a machine\n" in text
    assert "| tf32, asymq | 2 | 3 | 1.500 |" in text
    assert text.endswith(
        "Not in this run: 1\n\n- tf32, float_eager\n\nNot in old.csv: 1\n\n- tf32, reference\n"
    )


def test_against_what_is_not_comparable(tmp_path, capsys):
    run(OPS, tmp_path)
    run(STEP, tmp_path)
    ops_file, step_file = tmp_path / "ops_cpu.csv", tmp_path / "step_cpu.csv"
    assert "not of `benchmark.py step`" in refused(STEP, tmp_path, capsys, "--against", ops_file)
    assert "not of `benchmark.py ops`" in refused(OPS, tmp_path, capsys, "--against", step_file)
    elsewhere = tmp_path / "cuda.csv"
    elsewhere.write_text(ops_file.read_text().replace("cpu,", "cuda,"))
    message = refused(OPS, tmp_path, capsys, "--against", elsewhere)
    assert "was measured on cuda, this is cpu" in message
    larger = tmp_path / "larger.csv"
    larger.write_text(step_file.read_text().replace("layers=1", "layers=2"))
    assert "layers=2" in refused(STEP, tmp_path, capsys, "--against", larger)
    message = refused(STEP, tmp_path, capsys, "--against", tmp_path / "nothing.csv")
    assert "No such file" in message
    of_record = ROOT / "scripts" / "results" / "step_cuda.csv"
    assert "measured on cuda" in refused(STEP, tmp_path, capsys, "--against", of_record)


def test_results_of_record_can_be_compared_with():
    kinds = {"ops": (ops.OpTime, []), "step": (step.StepTime, [f"gpt2: {step.MODELS['gpt2']}"])}
    for path in (ROOT / "scripts" / "results").glob("*.csv"):
        command, device, *_ = path.stem.split("_")
        args = Namespace(against=path, command=command, device=device)
        assert recorded.read(args, *kinds[command]).rows, path.name


@pytest.mark.parametrize(
    "more, message",
    [
        (("--threads", "0"), "--threads: must be an integer of at least 1"),
        (("--only", "asymq,magic"), "no magic"),
    ],
)
def test_bad_input_is_one_line(more, message, tmp_path, capsys):
    assert message in refused(OPS, tmp_path / "out", capsys, *more)
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(OPS, tmp_path / "file", capsys)


@pytest.mark.parametrize(
    "command, more, message",
    [
        (STEP, ("--generate",), "--generate: measures recipes"),
        (STEP, ("--only", "recipes"), "--only recipes: without --recipe there are float_eager"),
        (RECIPES, ("--only", "asymq"), "--only asymq: with --recipe there are float_sdpa"),
        (RECIPES, ("--recipe", "w4a5"), "no recipe 'w4a5': choose from w4a16"),
        (RECIPES, ("--recipe", "w4a16"), "--recipe w4a16:group=128: model.layers.0"),
    ],
)
def test_bad_recipes_are_one_line(command, more, message, tmp_path, capsys):
    assert message in refused(command, tmp_path / "out", capsys, *more)


def test_every_operator_has_a_part():
    parts = {"asymq::fake_quantize": "fake-quantize", "aten::mm": "GEMMs", "aten::exp": "rest"}
    assert {name: profile.part(name) for name in parts} == parts
