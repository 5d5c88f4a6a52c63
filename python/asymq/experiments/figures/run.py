"""Every figure and table of the paper.

`run` trains the curves of all figures at once, since figures share curves, then writes every figure
as a PNG, its data as CSV, and its section of claims.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from asymq.experiments.common.files import BadInput, as_csv, need_writable, write
from asymq.experiments.common.pictures import write_figure
from asymq.experiments.common.processes import processors
from asymq.experiments.common.words import count
from asymq.experiments.figures import claims, gradients, losses, plots
from asymq.experiments.figures.claims import Runs
from asymq.experiments.figures.definitions import FIGURES, TITLES, Experiment, Settings
from asymq.experiments.figures.report import write_claims
from asymq.experiments.figures.toy_problem import SAMPLES, Run, run_all
from asymq.experiments.figures.verdict import judge
from asymq.experiments.table2.results import Entry

CSV_POINTS = 150  # of a curve


def run(names: list[str], out: Path, settings: Settings, table2_folder: Path | None) -> None:
    """Writes the figures `names` (none: all) into the folder `out`, and their claims into its
    claims.md, which keeps the claims of figures not among them.

    BadInput, before anything is trained: something given cannot be used.
    """
    chosen = names or list(TITLES)
    unknown = [name for name in chosen if name not in TITLES]
    if unknown:
        raise BadInput(f"unknown figure {unknown[0]!r}; there are {', '.join(TITLES)}")
    models: dict[str, list[Entry]] = {}
    if "figure4" in chosen:
        if table2_folder is not None:
            models = losses.read(table2_folder)
        elif names:
            raise BadInput(
                "figure4 is drawn from results of scripts/table2.py: give their folder as --table2"
            )
        else:
            chosen.remove("figure4")
            print(
                "Figure 4 is left out: run scripts/table2.py with --parameterizations scale_offset "
                "min_max beta_gamma beta_gamma_sigmoid, then this with --table2 FOLDER"
            )
    experiments = {name: settings.of(name) for name in chosen if name in FIGURES}
    need_writable(out)
    for name in chosen:
        if name in gradients.TABLES:
            write_table(name, out)
        elif name == "gradients":
            write_gradients(out)
        elif name == "figure4":
            losses.write_figure4(models, out)
    if experiments:
        train(experiments, out, settings)
    print(f"wrote {', '.join(chosen)} and claims.md into {out}")


def train(experiments: dict[str, Experiment], out: Path, settings: Settings) -> None:
    """Trains the curves of all figures, then writes them."""
    curves = [curve for figure in experiments.values() for curve in figure.curves()]
    runs, best = run_all(curves, settings.seeds, settings.steps, processors())
    for name, figure in experiments.items():
        own = {curve: runs[curve] for curve in figure.curves()}
        of_figure = Runs(figure.names, figure.bits, figure.lrs, own, best)
        write_figure_of(name, figure, of_figure, out)


def write_figure_of(name: str, figure: Experiment, runs: Runs, out: Path) -> None:
    """The picture, the data and the claims of a trained figure."""
    title = figure.title + f" (standard deviation of the samples: {figure.data.std:g})"
    own = list(runs.runs.values())
    write_figure(plots.DRAW[figure.draw](title, runs), out / f"{name}.png")
    write(out / f"{name}.csv", runs_csv(own))
    steps, seeds = own[0].ratio.shape
    lines = [
        f"{count(seeds, 'seed')}, {count(steps - 1, 'step')} of Adam, {SAMPLES:,} samples of "
        f"standard deviation {figure.data.std:g}, float64. {figure.note}".rstrip(),
        "",
    ]
    verdicts = [judge(claim, runs, steps - 1) for claim in figure.claims]
    write_claims(out, name, lines, verdicts, claims.table(own))


def runs_csv(runs: Iterable[Run]) -> str:
    """The plotted data at some steps of every run: the first seed, and the least and largest of
    all seeds; the error as a multiple of the best range's, mean of all seeds."""
    ends = [f"{end}{which}" for end in ("min", "max") for which in ("", "_least", "_largest")]
    header = ("parameterization", "bits", "lr", "scaled_rates", "step", *ends, "error")
    rows = []
    for run in runs:
        curve = run.curve
        for step in run.some_steps(CSV_POINTS):
            values = []
            for end in (run.low[step], run.high[step]):
                values += [end[0], end.min(), end.max()]
            values.append(run.ratio[step].mean())
            key = (curve.name, curve.bits, curve.lr, int(curve.chain_rule), step)
            rows.append((*key, *(f"{value.item():.4g}" for value in values)))
    return as_csv(header, rows)


def write_table(name: str, out: Path) -> None:
    write(out / f"{name}.md", gradients.markdown(name))
    write(out / f"{name}.csv", gradients.table_csv(name))
    write_claims(
        out, name, [f"All cells are in [{name}.md]({name}.md).", ""], gradients.judge(name)
    )


def write_gradients(out: Path) -> None:
    x, found = gradients.curves()
    write_figure(plots.draw_gradients(x, found), out / "gradients.png")
    write(out / "gradients.csv", gradients.curves_csv(x, found))
