"""The same training by other libraries: of the same model, text, bits, groups, steps and batches.

Weights have 4 bits in groups, symmetric (w4a16), and inputs 8 bits, asymmetric with a range of each
token (w4a8); embeddings and the head stay float. The quantizers are each library's own, and so is
what learns; the loss is the model's own, which they have in common, asymq's distillation beside it.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from asymq.experiments.common.files import BadInput, first_line, need_writable, write
from asymq.experiments.common.processes import Processes
from asymq.experiments.common.recipes import Recipe
from asymq.experiments.common.spread import Progress, need_devices
from asymq.experiments.study import cell as cells
from asymq.experiments.study.results import WHEN, read_result, reading
from asymq.experiments.study.setting import FROZEN, Setting
from asymq.experiments.study.subject import Protocol, Study, open_study
from asymq.experiments.study.table import each, milliseconds, title
from asymq.experiments.table2.results import need_same_settings

RECIPES = ("w4a16", "w4a8")
AIMET = "ASYMQ_AIMET_PYTHON"
# Library, recipe and what learns, the latter two empty where it is the library's matter.
Missing = tuple[str, str, str]
NOT_COMPARED: dict[Missing, str] = {
    ("nncf", "", ""): "learns weights in groups with adapters alone (FQ_LORA): another training"
}


@dataclass(frozen=True)
class Row:
    """One training. learns: "ranges", "weights" or "both". rate: of ranges, weights: of weights."""

    library: str
    recipe: str
    learns: str
    loss: str
    rate: str
    weights: str
    steps: int

    @property
    def name(self) -> str:
        return "__".join(map(str, asdict(self).values()))

    @property
    def package(self) -> str:
        """Whose version its result has."""
        return PEERS[self.library].package if self.library in PEERS else "asymq"

    def __str__(self) -> str:
        return f"{self.library} {self.recipe} {self.learns} {self.loss}"


@dataclass(frozen=True)
class Peer:
    """A library. package: on PyPI. prepare: puts quantizers into the linear layers that it is given
    by name, and calls what it is given to see data; its ranges as parameters. python: the variable
    that names the Python of an environment of its own."""

    package: str
    learns: tuple[str, ...]
    prepare: Callable[[nn.Module, list[str], Row, Callable[[], None]], list[nn.Parameter]]
    python: str | None = None

    @property
    def version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


# ---- the libraries -----------------------------------------------------------------------------


def _group(row: Row) -> int:
    recipe = Recipe.named(row.recipe)
    assert recipe is not None
    return dict(recipe.arguments)["group"]


def _torchao(model: nn.Module, names: list[str], row: Row, see: Callable[[], None]):
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    from torchao.quantization.qat.api import initialize_fake_quantizers

    learned = row.learns != "weights"
    weight = IntxFakeQuantizeConfig(
        torch.int4,  # type: ignore[attr-defined]
        group_size=_group(row),
        is_symmetric=True,
        is_dynamic=not learned,
        range_learning=learned,
    )
    inputs = None
    if row.recipe.startswith("w4a8"):
        inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    config = QATConfig(activation_config=inputs, weight_config=weight, step="prepare")
    quantize_(model, config, filter_fn=lambda module, name: name in names)
    if not learned:
        return []
    device = next(model.parameters()).device
    with torch.no_grad():
        initialize_fake_quantizers(model, (torch.zeros(1, 2, dtype=torch.int64, device=device),))
    return [p for name, p in model.named_parameters() if "fake_quantizer" in name]


def _aimet(model: nn.Module, names: list[str], row: Row, see: Callable[[], None]):
    """Min and max of groups of the weights, and of the inputs one range for all tokens: it has none
    of each token."""
    from aimet_torch.nn import QuantizedLinear
    from aimet_torch.quantization.affine import QuantizeDequantize

    group, ranges = _group(row), []
    for name in names:
        parent, _, own = name.rpartition(".")
        layer = QuantizedLinear.from_module(model.get_submodule(name))
        rows, columns = layer.weight.shape
        weight = QuantizeDequantize(
            (rows, columns // group), bitwidth=4, symmetric=True, block_size=(1, group)
        ).to(layer.weight)
        with weight.compute_encodings():
            weight(layer.weight)
        layer.param_quantizers["weight"] = weight
        ranges.append(weight)
        if row.recipe.startswith("w4a8"):
            inputs = QuantizeDequantize((), bitwidth=8, symmetric=False).to(layer.weight)
            layer.input_quantizers[0] = inputs
            ranges.append(inputs)
        setattr(model.get_submodule(parent), own, layer)
    if row.recipe.startswith("w4a8"):
        with ExitStack() as stack:
            for quantizer in ranges[1::2]:
                stack.enter_context(quantizer.compute_encodings())
            see()
    return [p for quantizer in ranges for p in quantizer.parameters()]


PEERS = {
    "torchao": Peer("torchao", ("weights", "ranges", "both"), _torchao),
    "aimet": Peer("aimet-torch", ("ranges", "both"), _aimet, AIMET),
}


def result_path(out: Path, row: Row) -> Path:
    return out / "peers" / f"{row.name}.json"


def _read_all(out: Path) -> dict[Path, tuple[Row, dict]]:
    """BadInput: one is damaged."""
    found = {}
    for path in sorted((out / "peers").glob("*__*.json")):
        with reading(path):
            result = read_result(path, "row")
            row = Row(**result["row"])
            for name, package in (("version", row.package), ("torch", "torch")):
                result[name] = result["versions"][package]
            found[path] = row, result
    return found


# ---- one row -----------------------------------------------------------------------------------


def _linear(model: nn.Module) -> list[str]:
    """The layers whose weights recipes have 4 bits for: all but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def run_row(row: Row, study: Study, out: Path, device: torch.device) -> None:
    setting = Setting(row.recipe, "beta_gamma", "adam", row.loss, row.rate, row.steps)
    setting = setting.replace(weights=row.weights)
    teacher = study.float_model(device)
    if row.library == "asymq":
        config = setting.config().replace(embedding=None, head=None)
        model = cells.prepared(teacher, config, setting)
        cells.calibrate(model, setting, study, 0)
        groups = cells.groups_of(model, setting)
    else:
        model = copy.deepcopy(teacher)

        @torch.no_grad()
        def see() -> None:
            for step in range(study.protocol.calibration_batches):
                model(input_ids=study.batch(step, 0).to(device))

        ranges = PEERS[row.library].prepare(model, _linear(model), row, see)
        groups = _groups(model, ranges, row)
    before = cells.measure(model, teacher, study)
    with Progress(str(row), row.steps) as bar:
        loss_of = cells.loss_function(model, teacher, setting)
        losses, seconds = cells.train(groups, loss_of, setting, study, 0, device, bar.show)
    after = cells.measure(model, teacher, study)
    result = cells.result_of(before, after, losses, seconds, study, device)
    if row.library in PEERS:  # asymq's is there
        result["versions"][row.package] = version(row.package)
    write(result_path(out, row), json.dumps(result | {"row": asdict(row)}))


def _groups(model: nn.Module, ranges: Iterable[nn.Parameter], row: Row) -> list[dict]:
    """What learns; the rest is frozen."""
    own = {id(p) for p in ranges}
    for parameter in model.parameters():
        learns = row.learns == "both" or (id(parameter) in own) == (row.learns == "ranges")
        parameter.requires_grad_(learns)
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if id(p) in own], "lr": float(row.rate)},
        {"params": [p for p in learned if id(p) not in own], "lr": float(row.weights)},
    ]
    return [group for group in groups if group["params"]]


# ---- all rows ----------------------------------------------------------------------------------


def rows_of(recipes: list[str], rates: Iterable[str], weights: Iterable[str], steps: int):
    """Of asymq and its peers, with every rate."""
    rates, weights, made = list(rates), list(weights), []
    learned = {"ranges": [(r, FROZEN) for r in rates], "weights": [(rates[0], w) for w in weights]}
    learned["both"] = [(r, w) for r in rates for w in weights]
    kinds = [("asymq", "ranges", "ce"), ("asymq", "ranges", "kl"), ("asymq", "both", "ce")]
    kinds += [(name, learns, "ce") for name, peer in PEERS.items() for learns in peer.learns]
    for recipe in recipes:
        for library, learns, loss in kinds:
            for rate, weight in learned[learns]:
                made.append(Row(library, recipe, learns, loss, rate, weight, steps))
    return made


def run(options, protocol: Protocol) -> None:
    """Trains what is not there yet, one row after the other on the first device, and writes
    peers.md. A library that is not installed has a row that says so, and what it fails at, another.
    BadInput: as run's."""
    recipes = [name for name in options.recipes if name.partition("-")[0] in RECIPES]
    if not recipes:
        raise BadInput(f"--recipes: peers are compared with {', '.join(RECIPES)}")
    device = (need_devices(options.devices) or ["cpu"])[0]
    study = open_study(
        options.model, options.data, options.train_text, options.test_text, protocol, recipes
    )
    need_writable(options.out)
    grid = options.grid
    rows = rows_of(recipes, grid.rates, grid.weight_rates, grid.base_steps)
    for path, (_, result) in _read_all(options.out).items():
        need_same_settings(path, result["settings"], study.settings)
    missing: dict[Missing, str] = {}
    for row in rows:
        kind = row.library, row.recipe, row.learns
        if {kind, (row.library, "", "")} & missing.keys() or result_path(options.out, row).exists():
            continue
        peer = PEERS.get(row.library)
        python = os.environ.get(peer.python) if peer and peer.python else None
        if python:
            job = {"row": asdict(row), "out": str(options.out), "device": device}
            job |= {"model": options.model, "data": options.data, "protocol": asdict(protocol)}
            job |= {k: str(v) if v else None for k, v in _texts(options).items()}
            done = subprocess.run(
                [python, "-m", "asymq.experiments.study.peers", json.dumps(job)],
                stdout=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                missing[row.library, "", ""] = f"{python} failed: its message is above"
        elif peer and peer.version is None:
            hint = f", or {peer.python} names no Python that has it" if peer.python else ""
            missing[row.library, "", ""] = f"not installed (pip install {peer.package}{hint})"
        else:
            Processes(device)
            try:
                run_row(row, study, options.out, torch.device(device))
            except Exception as error:  # whatever a version that does not fit comes up with
                if peer is None or isinstance(error, OSError):
                    raise
                said = first_line(error).replace("|", "\\|")
                missing[kind] = f"{row.package} {peer.version} failed: {said}"
    report(options.out, missing)


def _texts(options) -> dict:
    return {"train_text": options.train_text, "test_text": options.test_text}


def report(out: Path, missing: dict[Missing, str]) -> None:
    """Writes and prints peers.md."""
    found = sorted(_read_all(out).values(), key=lambda one: (one[0].recipe, one[0].library))
    head = ["library", "recipe", "learns", "loss", "rate of ranges", "of weights", "steps"]
    head += ["perplexity calibrated", "perplexity", "KL calibrated", "KL", "ms a step"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row, result in found:
        cell = [f"{row.library} {result['version']}", title(row.recipe), row.learns, row.loss]
        cell += ["" if row.learns == "weights" else row.rate]
        cell += ["" if row.weights == FROZEN else row.weights, str(row.steps)]
        values = (result[key][when] for key in ("perplexity", "kl") for when in WHEN)
        cell += ["diverged" if value is None else f"{value:.4g}" for value in values]
        lines.append(f"| {' | '.join([*cell, milliseconds(result)])} |")
    lines += [
        f"| {library} | {title(recipe)} | {learns} | {why} |{' |' * (len(head) - 4)}"
        for (library, recipe, learns), why in (missing | NOT_COMPARED).items()
    ]
    if found:
        results = [result for _, result in found]
        s = results[0]["settings"]
        lines += [
            "",
            f"{s['batch']} windows of {s['context']} tokens a step, Adam, one seed; float "
            f"perplexity {results[0]['float_perplexity']:.2f}; "
            f"torch {each(r['torch'] for r in results)}, "
            f"{each(r['machine'] for r in results)}. Weights 4 bits, symmetric, in groups; "
            "embeddings and head float. AIMET's inputs have one range for all tokens, the others' "
            "one of each; where weights alone learn, torchao takes the live weights' ranges.",
        ]
    table = "\n".join(lines) + "\n"
    write(out / "peers.md", table)
    print(table)


def main() -> None:
    """One row, of a library in an environment of its own."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    job = json.loads(sys.argv[1])
    row = Row(**job["row"])
    if PEERS[row.library].version is None:
        sys.exit(f"{row.library}: {sys.executable} has no {PEERS[row.library].package}")
    train, test = (Path(job[n]) if job[n] else None for n in ("train_text", "test_text"))
    try:
        protocol = Protocol(**job["protocol"])
        study = open_study(job["model"], job["data"], train, test, protocol, [row.recipe])
        run_row(row, study, Path(job["out"]), torch.device(job["device"]))
    except (BadInput, OSError, ImportError) as error:
        sys.exit(f"{row.library}: {first_line(error)}")


if __name__ == "__main__":
    main()
