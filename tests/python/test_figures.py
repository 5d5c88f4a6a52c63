"""The paper's figures: the toy problem, its known results, the tables, claims and the command."""

import csv
import json
import math
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from pictures import assert_picture

import asymq
from asymq.experiments.figures import (
    claims,
    definitions,
    gradients,
    losses,
    plots,
    toy_problem,
    verdict,
)
from asymq.experiments.figures import run as figures
from asymq.experiments.figures.claims import Runs
from asymq.experiments.figures.definitions import FIGURES, TITLES
from asymq.experiments.figures.toy_problem import Curve, Data, Run, Target, best_ranges, run_all

ROOT = Path(__file__).parents[2]
main = runpy.run_path(str(ROOT / "scripts" / "figures.py"))["main"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def quick(monkeypatch):
    """Coarse best ranges, and no processes."""
    monkeypatch.setattr(toy_problem, "_ROUNDS", 1)
    monkeypatch.setattr(toy_problem, "_GRID", 7)
    monkeypatch.setattr(figures, "processors", lambda: 1)


def trained(*curves, seeds=2, steps=5000):
    runs, _ = run_all(curves, seeds, steps, workers=1)
    return list(runs.values())


# ---- known results -----------------------------------------------------------------------------
#
# Found by an independent float64 study of the same problem with samples of its own.


@pytest.mark.parametrize(
    "target, low, high, mse",
    [
        (Target(1, False, 3, False), -2.22, 2.00, 0.0400),
        (Target(1, False, 8, False), -3.73, 3.60, 7.19e-5),
        (Target(1, False, 10, False), -3.85, 3.75, 4.53e-6),
        (Target(50, False, 3, False), -111, 100, 100.0),
        (Target(1, False, 3, True), -2.29, 2.29, 0.0466),
        (Target(1, True, 3, False), 0, 2.43, 0.00644),
    ],
)
def test_best_ranges(target, low, high, mse):
    best = best_ranges(target, seeds=2)
    # The study's samples have other extrema, by which many bits choose the span.
    assert (best.high - best.low).mean() == pytest.approx(high - low, rel=0.05)
    assert best.mse.mean() == pytest.approx(mse, rel=0.1 if target.bits > 4 else 0.03)
    if target.relu:
        assert not best.low.any()


def test_the_best_range_is_the_best():
    """No grid of one seed's 3-bit quantizers, of every first index and many scales, has less."""
    x = Data().samples(1)[0]
    (best,) = best_ranges(Target(1, False, 3, False), 1).mse
    scale = torch.linspace(0.3, 1.2, 400, dtype=torch.float64)[:, None]
    errors = [
        (
            asymq.fake_quantize_scale_offset(
                x.expand(400, -1), scale, torch.full_like(scale, n), bits=3
            )
            - x
        )
        .square()
        .mean(1)
        .min()
        for n in range(-7, 1)
    ]
    assert best <= min(errors) * 1.0005


def test_figure3_at_3_bits():
    """Both parameterizations arrive; straight-through gradients vanish 1.4 % above the best."""
    runs = trained(Curve("scale_offset", 3, "1e-2", Data()), Curve("min_max", 3, "5e-3", Data()))
    for run in runs:
        assert run.converged.all()
        for end, expected in ((run.low, -2.06), (run.high, 2.06)):
            assert end[-1].mean() == pytest.approx(expected, abs=0.02 * 4.12)
        assert run.final_ratio.mean() == pytest.approx(1.014, abs=0.03)


def test_figure3_at_10_bits():
    """min/max arrives, scale/offset does not."""
    lost, arrived = trained(
        *(Curve(name, 10, "1e-2", Data()) for name in ("scale_offset", "min_max")), steps=2500
    )
    assert not lost.converged.any()
    assert lost.final_ratio.min() > 1.5
    assert arrived.converged.all()
    for end, expected in ((arrived.low, -3.84), (arrived.high, 3.74)):
        assert end[-1].mean() == pytest.approx(expected, abs=0.02 * 7.58)
    assert arrived.final_ratio.mean() == pytest.approx(1.013, abs=0.03)


def test_figure7_coincides_with_scaled_rates():
    names = FIGURES["figure7"].names
    first, *others = trained(
        *(Curve(name, 3, "5e-3", Data(), chain_rule=True) for name in names), seeds=1, steps=2700
    )
    assert first.high[-1].item() == pytest.approx(2.23, rel=0.02)
    for other in others:
        assert claims.apart(other, first, slice(None)).max() < 6e-5
    # With one rate for all they are far apart on the way.
    first, *others = trained(
        *(Curve(name, 3, "5e-3", Data()) for name in names), seeds=1, steps=200
    )
    for other in others:
        assert claims.apart(other, first).min() > 0.1


def test_figure8_frozen_minimum():
    frozen, learned = trained(
        *(Curve(n, 3, "1e-2", Data(relu=True)) for n in ("min_max_frozen", "min_max")),
        steps=2500,
    )
    assert not frozen.low.any() and learned.low[-1].all()
    assert frozen.converged.all()
    assert frozen.final_ratio.mean() == pytest.approx(1.002, abs=0.03)
    assert frozen.oscillation.max() < 1e-3 and learned.oscillation.min() > 5e-3


# ---- the engine --------------------------------------------------------------------------------

FUNCTIONS = {
    "min_max": (asymq.fake_quantize_min_max, lambda low, high, k: (low, high)),
    "scale_offset": (
        asymq.fake_quantize_scale_offset,
        lambda low, high, k: ((high - low) / k, k * low / (high - low)),
    ),
    "kscale_koffset": (
        asymq.fake_quantize_kscale_koffset,
        lambda low, high, k: (high - low, low / (high - low)),
    ),
}
# The factor of a step from the present values of both parameters and their first.
RULES = {
    "min_max": lambda now, first, k: (1, 1),
    "scale_offset": lambda now, first, k: (1, 1),
    "kscale_koffset": lambda now, first, k: (1, 1),
    "min_max_plus": lambda now, first, k: (abs(first[0]), abs(first[1])),
    "naive": lambda now, first, k: (abs(first[0]), abs(first[1])),
    "naive_current": lambda now, first, k: (abs(now[0]), abs(now[1])),
    "sophisticated": lambda now, first, k: (2 / k, 1 / now[0]),
}


@pytest.mark.parametrize("name", RULES)
def test_a_seed_is_a_problem_of_its_own(name):
    """Adam as its paper has it, of one tensor with a range of one element, in Python floats."""
    steps, k, rate = 6, 15, 1e-2
    (run,) = trained(Curve(name, 4, "1e-2", Data()), seeds=3, steps=steps)
    x = Data().samples(3)[1]
    kind = name if name in FUNCTIONS else {"min_max_plus": "min_max"}.get(name, "scale_offset")
    function, of_range = FUNCTIONS[kind]
    now = [value.item() for value in of_range(x.min(), 3 * x.max(), k)]
    first, mean, square = list(now), [0.0, 0.0], [0.0, 0.0]
    learned = list(run.learned.values())
    for step in range(steps + 1):
        assert [values[step, 1].item() for values in learned] == pytest.approx(now, rel=1e-9)
        range_ = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in now]
        torch.nn.functional.mse_loss(function(x, *range_, bits=4), x).backward()
        factors = RULES[name](now, first, k)
        before = list(now)
        for i in range(2):
            gradient = range_[i].grad.item()
            mean[i] = 0.9 * mean[i] + 0.1 * gradient
            square[i] = 0.999 * square[i] + 0.001 * gradient**2
            m, v = mean[i] / (1 - 0.9 ** (step + 1)), square[i] / (1 - 0.999 ** (step + 1))
            now[i] = before[i] - factors[i] * rate * m / (math.sqrt(v) + 1e-8)


def test_seeds_do_not_depend_on_their_number():
    curve = Curve("beta_gamma_sigmoid", 4, "1e-2", Data())
    (one,), (three,) = trained(curve, seeds=1, steps=5), trained(curve, seeds=3, steps=5)
    for name in ("low", "high", "ratio"):
        assert torch.equal(getattr(one, name)[:, 0], getattr(three, name)[:, 0])


def test_processes_change_nothing():
    curves = [Curve(name, 3, "1e-2", Data()) for name in ("scale_offset", "min_max")]
    alone, _ = run_all(curves, 1, 5, workers=1)
    shared, _ = run_all(curves, 1, 5, workers=2)
    for curve in curves:
        assert torch.equal(alone[curve].high, shared[curve].high)
        assert torch.equal(alone[curve].ratio, shared[curve].ratio)


@pytest.mark.parametrize("name", toy_problem.VARIANTS)
def test_every_parameterization_starts_at_the_extrema_and_learns(name, quick):
    symmetric = name.startswith("symmetric")
    (run,) = trained(Curve(name, 8, "1e-2", Data(reach=1)), steps=3)
    x = Data().samples(2)
    high = x.abs().amax(1) if symmetric else x.amax(1)
    low = -high if symmetric else x.amin(1)
    # σ(4) of it with the sigmoid.
    share = 1 / (1 + math.exp(-4.0)) if name.endswith("sigmoid") else 1
    torch.testing.assert_close(run.high[0], share * high, rtol=1e-12, atol=0)
    torch.testing.assert_close(run.low[0], share * low, rtol=1e-12, atol=0)
    assert (run.high[3] != run.high[0]).all()
    assert all(values.dtype == torch.float64 for values in run.learned.values())


def test_drifting_samples():
    widths = Data(drifting=True).widths(100)
    assert (widths[:21] == 1).all() and (widths[80:] == 10).all()
    assert (widths[20:81].diff() > 0).all()
    (run,) = trained(Curve("beta_gamma_dynamic", 4, "1e-3", Data(drifting=True)), steps=10)
    x = Data().samples(2)
    # The factors have moved by at most 0.01, the samples tenfold.
    torch.testing.assert_close(run.high[-1], 10 * x.amax(1), rtol=0.011, atol=0)


# ---- definitions -------------------------------------------------------------------------------


def made(high, ratio, name="min_max", low=None):
    """A run of one seed with these values."""
    column = torch.tensor(high, dtype=torch.float64)[:, None]
    lows = torch.zeros_like(column) if low is None else torch.tensor(low).double()[:, None]
    ratios = torch.tensor(ratio, dtype=torch.float64)[:, None]
    return Run(Curve(name, 3, "1e-2", Data()), lows, column, {}, ratios)


def test_converged():
    still, near = [1.0] * 5001, [1.09] * 5001
    assert made(still, near).converged.all()
    assert not made(still, [*near[:-1], 1.11]).converged.any()
    moved = [*still[:4001], *[1.021] * 1000]
    assert not made(moved, near).converged.any()
    assert made([*still[:4000], *[1.021] * 1001], near).converged.all()


def test_oscillation_is_of_the_last_500_steps_and_the_larger_end():
    high = [2.0] * 4499 + [5.0] + [2.0] * 499 + [1.9, 2.0]
    assert made(high, [1.0] * 5001).oscillation.item() == pytest.approx(0.05)
    low = [0.0] * 4999 + [-0.4, 0.0]
    assert made(high, [1.0] * 5001, low=low).oscillation.item() == pytest.approx(0.2)


def test_arrival():
    assert made([1.0] * 4, [3, 1.06, 1.05, 2]).arrival().item() == 2
    assert math.isinf(made([1.0] * 2, [3, 2]).arrival().item())


def alone(run):
    """The runs of a figure that has only this one."""
    return Runs(("min_max",), (3,), ("1e-2",), {run.curve: run}, {})


def test_a_claim_without_its_curves_is_not_evaluated():
    runs = alone(made([1.0] * 11, [1.0] * 11))
    verdicts = {c.sentence: verdict.judge(c, runs, 5000) for c in claims.FIGURE3}
    holds = {v.sentence: v.holds for v in verdicts.values()}
    assert holds.pop("min/max converges consistently in all scenarios.") is True
    assert set(holds.values()) == {None}
    assert "scale/offset at 10 bits" in next(iter(verdicts.values())).measured


def test_verdicts_follow_the_runs():
    good, bad = made([1.0] * 11, [1.0] * 11), made([1.0] * 11, [3.0] * 11)
    claim = next(c for c in claims.FIGURE3 if c.sentence.startswith("min/max converges"))
    for run, expected in ((good, True), (bad, False)):
        assert verdict.judge(claim, alone(run), 5000).holds is expected


def test_few_steps_decide_nothing():
    run = made([1.0] * 11, [1.0] * 11)
    claim = next(c for c in claims.FIGURE3 if c.sentence.startswith("min/max converges"))
    found = verdict.judge(claim, alone(run), 10)
    assert (found.holds, found.word) == (None, "not decided: too few steps")
    assert "1 of 1 runs converge" in found.measured
    # The first step is enough for the claim that is about it.
    assert [claim.steps for claim in claims.OFFSETS] == [1, 5000]


# ---- Tables 1 and 3 ----------------------------------------------------------------------------


def test_cells_of_table_1_that_differ():
    different = {
        (cell.row.title, cell.row.learned, cell.region)
        for cell in gradients.compare(gradients.TABLE1)
        if cell.differs
    }
    clipped = ("below", "above")
    assert different == {
        *(("scale/offset", "offset", region) for region in clipped),
        *(("min/max", name, region) for name in ("min", "max") for region in clipped),
        *(("beta/gamma", name, region) for name in ("beta", "gamma") for region in clipped),
        *(
            ("beta/gamma with sigmoid", name, region)
            for name in ("beta", "gamma")
            for region in ("inside", *clipped)
        ),
    }


def test_cells_of_table_3_that_differ():
    different = {c.row.title for c in gradients.compare(gradients.TABLE3) if c.differs}
    assert different == {"symmetric γ with sigmoid"}
    assert [verdict.holds for verdict in gradients.judge("table3")] == [True, True]


@pytest.mark.parametrize("name", gradients.TABLES)
def test_every_different_cell_has_a_reason(name):
    text = gradients.markdown(name)
    marked = [cell for cell in gradients.compare(gradients.TABLES[name]) if cell.differs]
    assert text.count("**≠**") == len(marked)
    for cell in marked:
        assert f"{cell.name} {cell.region}" in text
        assert cell.row.reasons[cell.region] in text


@pytest.mark.parametrize("title", gradients.LEARNED)
def test_gradients_over_x_are_those_of_one_range(title):
    """Summed over x, they are what one range for all x would get."""
    spec, values, constants = gradients.LEARNED[title]
    x, found = gradients.curves()
    learned = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in values]
    fixed = [torch.tensor([v], dtype=torch.float64) for v in constants]
    options = {"link": spec.link} if spec.sigmoid else {}
    function = getattr(asymq, spec.function)
    function(x, *learned, *fixed, bits=gradients.BITS, **options).sum().backward()
    for name, parameter in zip(spec.learnable, learned, strict=True):
        assert found[title][name].sum().item() == pytest.approx(parameter.grad.item(), rel=1e-9)


# ---- the command -------------------------------------------------------------------------------


def rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_everything_is_written(tmp_path, quick, capsys):
    main(["--out", str(tmp_path), "--seeds", "1", "--steps", "3"])
    assert "--table2" in capsys.readouterr().out
    trained_figures = [*FIGURES]
    expected = {
        f"{name}.{kind}" for name in (*trained_figures, "gradients") for kind in ("png", "csv")
    }
    expected |= {f"{name}.{kind}" for name in ("table1", "table3") for kind in ("md", "csv")}
    assert {path.name for path in tmp_path.iterdir()} == {*expected, "claims.md"}
    for path in tmp_path.glob("*.png"):
        assert_picture(path)
    text = (tmp_path / "claims.md").read_text()
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    without = ("figure4", "gradients")
    assert titles == [title for name, title in TITLES.items() if name not in without]
    for figure in FIGURES.values():
        for claim in figure.claims:
            assert f"| {claim.sentence} |" in text
    found = rows(tmp_path / "figure3.csv")
    assert {row["step"] for row in found} == {"0", "1", "2", "3"}
    assert {(row["bits"], row["lr"]) for row in found} >= {("3", "1e-2"), ("10", "5e-3")}


def test_settings_change_a_figure(tmp_path, quick):
    short = ["--out", str(tmp_path), "--seeds", "2", "--steps", "2"]
    main(["figure3", "figure9", *short])
    changed = "--bits 5 --lr 2e-3 1e-4 --std 2 --params naive min_max".split()
    main(["figure9", *short, *changed])
    found = rows(tmp_path / "figure9.csv")
    assert {(row["parameterization"], row["bits"], row["lr"]) for row in found} == {
        (name, "5", lr) for name in ("naive", "min_max") for lr in ("2e-3", "1e-4")
    }
    largest = (2 * Data().samples(2)).amax(1)
    first = next(row for row in found if row["step"] == "0")
    assert float(first["max_largest"]) == pytest.approx(largest.max().item(), rel=1e-4)
    assert float(first["max"]) == pytest.approx(largest[0].item(), rel=1e-4)
    text = (tmp_path / "claims.md").read_text()
    assert text.count("\n## ") == 2, "the other figure's claims stay"
    assert "needs scale/offset | not evaluated |" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["figure10"], "unknown figure 'figure10'"),
        (["figure4"], "--table2"),
        (["figure4", "--table2", "nowhere"], "has no results of scripts/table2.py"),
        (["figure3", "--seeds", "0"], "--seeds: must be an integer of at least 1"),
        (["figure3", "--steps", "-1"], "--steps: must be an integer of at least 1"),
        (["figure3", "--lr", "0"], "--lr: must be a positive number"),
        (["figure3", "--lr", "nan"], "--lr: must be a positive number"),
        (["figure3", "--bits", "1"], "--bits: must be an integer from 2 to 16"),
        (["figure3", "--std", "x"], "--std: must be a positive number"),
        (["figure3", "--params", "tanh"], "--params tanh: unknown"),
        (["figure3", "--params", "symmetric_max"], "asymmetric ranges"),
        (["figure7", "--params", "min_max"], "symmetric ranges"),
    ],
)
def test_bad_input_is_a_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_out_that_cannot_be_written(name, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as exit:
        main(["table1", "--out", str(tmp_path / name)])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert f"--out {tmp_path / name}" in error and error.count("\n") == 1


# ---- the pictures ------------------------------------------------------------------------------


@pytest.fixture
def short(quick):
    """Both learning rates of two parameterizations at two bit widths, three steps of one seed."""
    figure = definitions.Settings(names=("scale_offset", "min_max"), bits=(3, 10)).of("figure6")
    runs, best = run_all(figure.curves(), 1, 3, workers=1)
    yield Runs(figure.names, figure.bits, figure.lrs, runs, best)
    plots.plt.close("all")


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def has_whole_ticks(axis):
    return all(float(tick).is_integer() for tick in axis.get_ticklocs())


def test_picture_of_ranges(short):
    figure = plots.draw_ranges("Title", short)
    assert [axes.get_title() for axes in figure.axes] == ["3 bits", "10 bits"]
    assert labels(figure) == [
        *("scale/offset, lr 1e-2", "scale/offset, lr 5e-3", "min/max, lr 1e-2", "min/max, lr 5e-3"),
        *("all seeds", "best range (mean)"),
    ]
    for axes in figure.axes:
        ends = [
            line for line in axes.lines if len(line.get_ydata()) and line.get_marker() != "None"
        ]
        # Both ends of four runs; where they lie on each other, no two are alike.
        assert len([line for line in ends if len(line.get_xdata()) == 4]) == 8
        drawn = {(line.get_color(), line.get_linewidth()) for line in ends}
        assert len(drawn) == 4
        assert (axes.get_xlabel(), axes.get_ylabel()) == (plots.RANGE, "training step")
        assert has_whole_ticks(axes.yaxis)


def test_picture_of_rates(short):
    figure = plots.draw_rates("Title", short)
    assert [axes.get_title() for axes in figure.axes] == [
        f"{bits} bits, lr {lr}{part}"
        for lr in ("1e-2", "5e-3")
        for bits in (3, 10)
        for part in ("", ": the first 1 step")
    ]
    assert [axes.get_ylim()[1] for axes in figure.axes] == [3, 1] * 4


@pytest.mark.parametrize("draw", [plots.draw_drift, plots.draw_scale_offset])
def test_pictures_of_two_panels_a_bit_width(short, draw):
    figure = draw("Title", short)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["3 bits", "3 bits", "10 bits", "10 bits"]


def test_picture_of_gradients():
    figure = plots.draw_gradients(*gradients.curves())
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["the function, asymmetric", *gradients.LEARNED]
    second = figure.axes[1].get_legend().get_texts()
    assert [text.get_text() for text in second] == ["∂x̂/∂s", "∂x̂/∂z"]
    plots.plt.close(figure)


# ---- Figure 4 ----------------------------------------------------------------------------------


def fabricate(folder, name, lr, losses):
    """A result of scripts/table2.py with what Figure 4 reads of it."""
    result = {
        "model": "tiny",
        "parameterization": name,
        "lr": float(lr),
        "fp_ppl": 1.0,
        "final_ppl": 1.0,
        "settings": {"steps": len(losses)},
        "loss": losses,
    }
    (folder / f"tiny__{name}__{lr}.json").write_text(json.dumps(result))


def test_figure4(tmp_path):
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    for lr in ("1e-2", "1e-3"):
        fabricate(results, "min_max", lr, [4 - 0.01 * i for i in range(40)])
        fabricate(results, "beta_gamma", lr, [4 - 0.02 * i for i in range(40)])
    fabricate(results, "scale_offset", "1e-2", [4.0, 9.0, None, None, *[5.0] * 36])
    main(["figure4", "--table2", str(results), "--out", str(out)])
    assert_picture(out / "figure4.png")
    found = rows(out / "figure4.csv")
    assert {(row["parameterization"], row["lr"]) for row in found} == {
        ("min_max", "1e-2"),
        ("min_max", "1e-3"),
        ("beta_gamma", "1e-2"),
        ("beta_gamma", "1e-3"),
        ("scale_offset", "1e-2"),
    }
    # Means of two losses each, up to where one is not finite.
    short = [row for row in found if row["parameterization"] == "scale_offset"]
    assert [(row["step"], row["loss"]) for row in short] == [("2", "6.5")]
    first = next(row for row in found if row["parameterization"] == "beta_gamma")
    assert (first["step"], first["loss"]) == ("2", "3.99")
    lines = [line for line in (out / "claims.md").read_text().splitlines() if "| tiny: " in line]
    words = [line.rsplit("| ", 1)[1] for line in lines]
    assert words == [*["not decided: too few steps |"] * 2, "not evaluated |"]


def test_picture_of_losses(tmp_path):
    for name in ("scale_offset", "min_max", "beta_gamma", "new_one"):
        fabricate(tmp_path, name, "1e-2", [4.0] * 40)
    figure = losses.draw(losses.read(tmp_path))
    left, right = figure.axes
    assert left.get_title() == "tiny: scale/offset"
    assert right.get_title() == "tiny: min/max, beta/gamma, new/one"
    for axes, names in ((left, ["scale/offset"]), (right, ["min/max", "beta/gamma", "new/one"])):
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend == [f"{name} 1e-2" for name in names]
        assert len(axes.lines) == len(names)
        assert has_whole_ticks(axes.xaxis)
    plots.plt.close(figure)


@pytest.mark.parametrize(
    "last, holds",
    [
        # scale/offset, min/max, beta/gamma, with sigmoid
        ((9.0, 3.5, 3.3, 3.4), [True, True, True]),
        ((3.8, 3.5, 3.4, 3.3), [False, True, False]),
        ((9.0, 4.1, 3.3, 3.4), [True, False, True]),
    ],
)
def test_claims_of_losses(last, holds):
    names = ("scale_offset", "min_max", "beta_gamma", "beta_gamma_sigmoid")
    losses = {(name, "1e-2"): (4.0, value) for name, value in zip(names, last, strict=True)}
    assert [verdict.holds for verdict in claims.of_losses("tiny", losses, 2000)] == holds
