"""Every experiment of the paper: its figures, tables and claims.

FIGURES lists what is trained. `run` trains all of it at once, since figures share curves, then
writes every figure as a PNG, its data as CSV, and its section of claims.md.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from asymq.experiments import claims, figure_plots, gradients, table2
from asymq.experiments.claims import Claim, Runs, Verdict
from asymq.experiments.files import BadInput, write
from asymq.experiments.measuring import header
from asymq.experiments.range_learning import read_result
from asymq.experiments.table2_plots import draw_losses, loss_means, loss_window, write_figure
from asymq.experiments.toy_problem import (
    PARAMETERIZATIONS,
    SAMPLES,
    Curve,
    Data,
    Run,
    run_all,
)

CSV_POINTS = 150  # of a curve


@dataclass(frozen=True)
class Experiment:
    """A figure that is trained: a curve for every name, bit width and learning rate (as typed).

    draw: of figure_plots.DRAW. note: what the paper leaves open or says otherwise. chain_rules:
    panels with equal and with scaled learning rates. unseen: curves for claims alone, as (name,
    bits, learning rate).
    """

    title: str
    names: tuple[str, ...]
    bits: tuple[int, ...]
    lrs: tuple[str, ...]
    claims: tuple[Claim, ...]
    data: Data = field(default_factory=Data)
    draw: str = "ranges"
    note: str = ""
    chain_rules: tuple[bool, ...] = (False,)
    unseen: tuple[tuple[str, int, str], ...] = ()

    def curves(self) -> list[Curve]:
        drawn = [
            Curve(name, bits, lr, self.data, rule)
            for bits in self.bits
            for rule in self.chain_rules
            for name in self.names
            for lr in self.lrs
        ]
        unseen = [Curve(name, bits, lr, self.data) for name, bits, lr in self.unseen]
        return list(dict.fromkeys(drawn + unseen))


FIGURES = {
    "figure3": Experiment(
        "Figure 3: scale/offset and min/max",
        ("scale_offset", "min_max"),
        (3, 10),
        ("1e-2", "5e-3"),
        claims.FIGURE3,
        note="The caption gives the learning rates 1e-2 and 1e-3, the text 1e-2 and 5e-3. With "
        "1e-3 Adam cannot travel the distance in 5,000 steps, so 5e-3 is drawn.",
        unseen=(
            *((name, bits, "1e-3") for name in ("scale_offset", "min_max") for bits in (3, 10)),
            ("scale_offset", 16, "1e-2"),
        ),
    ),
    "figure5": Experiment(
        "Figure 5: min/max and beta/gamma on wide data",
        ("min_max", "min_max_plus", "beta_gamma", "beta_gamma_sigmoid"),
        (3, 10),
        ("5e-3", "1e-3"),
        claims.FIGURE5,
        Data(std=50),
        note="The sigmoid's arguments start at 4.",
    ),
    "figure6": Experiment(
        "Figure 6: appropriate learning rates for scale/offset",
        (
            *("scale_offset", "kscale_koffset", "naive", "naive_current", "sophisticated"),
            *("min_max", "beta_gamma"),
        ),
        (3, 10),
        ("1e-2", "5e-3"),
        claims.FIGURE6,
        note="naive scales the steps by the first |s| and |z|, a variant by the current ones. "
        "min/max and beta/gamma are drawn because the text compares with them.",
    ),
    "figure7": Experiment(
        "Figure 7: symmetric quantization",
        claims.SYMMETRIC,
        (3,),
        ("5e-3",),
        claims.FIGURE7,
        chain_rules=(False, True),
        note="Scaled learning rates: s times 2/k, γ divided by the first θmax.",
    ),
    "figure8": Experiment(
        "Figure 8: data after ReLU",
        ("scale_offset", "min_max", "min_max_frozen"),
        (3, 8),
        ("1e-2", "5e-3"),
        claims.FIGURE8,
        Data(relu=True),
        note='The caption\'s "identical to Figure 5" cannot be meant: at a standard deviation of '
        "50 min/max travels too slowly. This is standard deviation 1 with the learning rates of "
        "Figure 3.",
    ),
    "figure9": Experiment(
        "Figure 9: ranges that start at the extrema of the data",
        ("scale_offset", "min_max", "beta_gamma"),
        (4, 8),
        ("1e-2", "5e-3"),
        claims.FIGURE9,
        Data(reach=1),
    ),
    "drift": Experiment(
        "Section 3: a range that changes during training",
        ("min_max", "min_max_plus", "beta_gamma", "beta_gamma_sigmoid", "beta_gamma_dynamic"),
        (4,),
        ("1e-2", "1e-3"),
        claims.DRIFT,
        Data(reach=1, drifting=True),
        draw="drift",
        note="The paper has no figure of this. From a fifth to four fifths of the steps the "
        "samples become ten times as wide; ranges start at the first extrema.",
    ),
    "offsets": Experiment(
        "A.2: scale and offset under scale/offset and min/max",
        ("sophisticated", "min_max"),
        (10,),
        ("1e-2", "5e-3"),
        claims.OFFSETS,
        draw="scale_offset",
        note="The paper has no figure of this. sophisticated scales the steps of s by 2/k, as "
        "min/max moves it (eqs. 5 to 8).",
    ),
}
FIGURE4 = "Figure 4: loss of language models"
GRADIENTS = "Gradients over x"
TITLES = {
    "figure3": FIGURES["figure3"].title,
    "figure4": FIGURE4,
    **{name: figure.title for name, figure in FIGURES.items()},
    "gradients": GRADIENTS,
    "table1": "Table 1: gradients of asymmetric ranges",
    "table3": "Table 3: gradients of symmetric ranges",
}


@dataclass(frozen=True)
class Settings:
    """What the command line changes. None: as the figure has it."""

    seeds: int = 5
    steps: int = 5000
    lrs: tuple[str, ...] | None = None
    bits: tuple[int, ...] | None = None
    std: float | None = None
    names: tuple[str, ...] | None = None

    def of(self, name: str) -> Experiment:
        """The figure `name` with these settings. BadInput: symmetric and asymmetric ranges are not
        for the same figure."""
        figure = FIGURES[name]
        symmetric = figure.names[0] in claims.SYMMETRIC
        for other in self.names or ():
            if other not in PARAMETERIZATIONS:
                raise BadInput(
                    f"--params {other}: unknown; there are {', '.join(PARAMETERIZATIONS)}"
                )
            if (other in claims.SYMMETRIC) != symmetric:
                kind = "symmetric" if symmetric else "asymmetric"
                raise BadInput(
                    f"--params {other}: {name} is of {kind} ranges; name the figures it is for"
                )
        changed = {"lrs": self.lrs, "bits": self.bits, "names": self.names}
        changed = {key: value for key, value in changed.items() if value is not None}
        if changed:
            # Curves for claims alone go with the figure's own ones.
            changed["unseen"] = ()
        if self.std is not None:
            changed["data"] = replace(figure.data, std=self.std)
        return replace(figure, **changed)


def run(names: list[str], out: Path, settings: Settings, table2_folder: Path | None) -> None:
    """Writes the figures `names` (none: all) into the folder `out`, and their claims into its
    claims.md, which keeps the claims of figures not among them.

    BadInput, before anything is trained: something given cannot be used.
    """
    chosen = names or list(TITLES)
    unknown = [name for name in chosen if name not in TITLES]
    if unknown:
        raise BadInput(f"unknown figure {unknown[0]!r}; there are {', '.join(TITLES)}")
    losses = None
    if "figure4" in chosen:
        if table2_folder is not None:
            losses = read_losses(table2_folder)
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
        if name in ("table1", "table3"):
            write_table(name, out)
        elif name == "gradients":
            write_gradients(out)
        elif name == "figure4":
            write_losses(losses, out)
    if experiments:
        train(experiments, out, settings)
    print(f"wrote {', '.join(chosen)} and claims.md into {out}")


def need_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}") from None


def train(experiments: dict[str, Experiment], out: Path, settings: Settings) -> None:
    """Trains the curves of all figures, then writes them."""
    curves = [curve for figure in experiments.values() for curve in figure.curves()]
    runs, best = run_all(curves, settings.seeds, settings.steps, _processors())
    for name, figure in experiments.items():
        own = {curve: runs[curve] for curve in figure.curves()}
        of_figure = Runs(figure.names, figure.bits, figure.lrs, own, best)
        title = figure.title + f" (standard deviation of the samples: {figure.data.std:g})"
        drawn = figure_plots.DRAW[figure.draw](title, of_figure)
        write_figure(drawn, out / f"{name}.png")
        write(out / f"{name}.csv", as_csv(own.values()))
        lines = [
            f"{settings.seeds} seeds, {settings.steps:,} steps of Adam, {SAMPLES:,} samples of "
            f"standard deviation {figure.data.std:g}, float64. {figure.note}".rstrip(),
            "",
        ]
        verdicts = [claims.judge(claim, of_figure) for claim in figure.claims]
        write_claims(out, name, lines, verdicts, claims.table(own.values()))


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- files -------------------------------------------------------------------------------------


def as_csv(runs: Iterable[Run]) -> str:
    """The plotted data at some steps of every run: the first seed, and the least and largest of
    all seeds; the error as a multiple of the best range's, mean of all seeds."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    ends = [f"{end}{which}" for end in ("min", "max") for which in ("", "_least", "_largest")]
    writer.writerow(("parameterization", "bits", "lr", "scaled_rates", "step", *ends, "error"))
    for run in runs:
        curve = run.curve
        for step in run.some_steps(CSV_POINTS):
            values = []
            for end in (run.low[step], run.high[step]):
                values += [end[0], end.min(), end.max()]
            values.append(run.ratio[step].mean())
            writer.writerow(
                (
                    *(curve.name, curve.bits, curve.lr, int(curve.chain_rule), step),
                    *(f"{value.item():.4g}" for value in values),
                )
            )
    return file.getvalue()


_INTRODUCTION = """\
# The paper's claims, checked

Written by `scripts/figures.py`; every verdict is computed from the runs. A run converges if its
error (mean squared) is below 1.1 times that of the best range, which is searched by brute force,
and its ends moved by less than 2 % of the span over the last 1,000 steps. Oscillation is peak to
peak over the last 500 steps, of the end that oscillates more. Ends and errors are those of the last
step, means over the seeds. The paper's straight-through gradients do not vanish at the best range:
a converged run at 3 bits stays 1 to 3 % above its error.
"""


def write_claims(
    out: Path, name: str, lines: list[str], verdicts: list[Verdict], more: list[str] = ()
) -> None:
    """Replaces the section of a figure in claims.md, the others stay."""
    path = out / "claims.md"
    sections = {}
    if path.exists():
        _, *parts = path.read_text(encoding="utf-8").split("\n## ")
        titles = {title: key for key, title in TITLES.items()}
        for part in parts:
            title, _, body = part.partition("\n")
            if title in titles:
                sections[titles[title]] = body.strip("\n")
    table = ["| claim | measured | verdict |", "|---|---|---|", *map(str, verdicts)]
    conditions = ["", f"({'; '.join(header('cpu', 'CPU'))})"]
    body = [*lines, *table, *(["", *more] if more else []), *conditions]
    sections[name] = "\n".join(body)
    text = [f"## {TITLES[key]}\n\n{sections[key]}\n" for key in TITLES if key in sections]
    write(path, "\n".join([_INTRODUCTION, *text]))
    print(TITLES[name])
    for verdict in verdicts:
        print(f"  {verdict.word}: {verdict.sentence}")


def write_table(name: str, out: Path) -> None:
    write(out / f"{name}.md", gradients.markdown(name))
    write(out / f"{name}.csv", gradients.table_csv(name))
    write_claims(
        out, name, [f"All cells are in [{name}.md]({name}.md).", ""], gradients.judge(name)
    )


def write_gradients(out: Path) -> None:
    x, found = gradients.curves()
    write_figure(figure_plots.draw_gradients(x, found), out / "gradients.png")
    write(out / "gradients.csv", gradients.as_csv(x, found))


# ---- Figure 4 ----------------------------------------------------------------------------------


def read_losses(folder: Path) -> dict[str, list[dict]]:
    """The results of a folder of scripts/table2.py, by model. BadInput: there are none."""
    found = [read_result(path) for path in table2.results(folder)] if folder.is_dir() else []
    found = [result for result in found if result.get("loss")]
    if not found:
        raise BadInput(f"--table2 {folder}: has no results of scripts/table2.py")
    models = dict.fromkeys(result["model"] for result in found)
    return {
        model: sorted((r for r in found if r["model"] == model), key=table2.order)
        for model in models
    }


def write_losses(losses: dict[str, list[dict]], out: Path) -> None:
    write_figure(_draw_losses(losses), out / "figure4.png")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("model", "parameterization", "lr", "step", "loss"))
    verdicts, lines = [], []
    for model, own in losses.items():
        window = loss_window(own)
        for result in own:
            means = loss_means(result["loss"], window)
            for i in range(0, len(means), max(1, len(means) // CSV_POINTS)):
                key = (model, result["parameterization"], result["cell"].lr)
                writer.writerow((*key, i + window, f"{means[i]:.5g}"))
        lines.append(
            f"{model}: {own[0]['settings']['steps']:,} steps; losses are means of {window} "
            "training batches, in nats per token."
        )
        verdicts += claims.of_losses(model, _first_and_last(own, window))
    write(out / "figure4.csv", file.getvalue())
    write_claims(out, "figure4", [*lines, ""], verdicts)


def _first_and_last(own: list[dict], window: int) -> dict[tuple[str, str], tuple[float, float]]:
    """By parameterization and learning rate, the mean of the first and of the last `window` losses;
    the last is infinite where a loss was not finite."""
    found = {}
    for result in own:
        means = loss_means(result["loss"], window) or [float("inf")]
        last = float("inf") if None in result["loss"] else means[-1]
        found[result["parameterization"], result["cell"].lr] = means[0], last
    return found


def _draw_losses(losses: dict[str, list[dict]]) -> Figure:
    rows = len(losses)
    figure, grid = plt.subplots(
        rows, 2, figsize=(11, 4.5 * rows), layout="constrained", squeeze=False
    )
    for axes, (model, own) in zip(grid, losses.items(), strict=True):
        window = draw_losses(axes, own)
        for axis in axes:
            axis.set_title(f"{model}, mean of the last {window} training batches", fontsize=10.5)
    figure.suptitle(FIGURE4)
    return figure
