"""One cell of Table 2: a model, its quantizers, and ranges that learn while the weights do not.

The weights are frozen and dropout is off, so that a step depends on the ranges and its batch alone.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import asymq
from asymq.experiments.common import text
from asymq.experiments.common.files import write
from asymq.experiments.common.processes import Processes
from asymq.experiments.common.provenance import provenance
from asymq.experiments.table2.protocol import OF_PAPERS_QUANTIZERS, Protocol
from asymq.experiments.table2.results import (
    Cell,
    checkpoint_path,
    finite_or_none,
    perplexity_or_word,
    ranges_path,
    read_checkpoint,
    read_results,
    result_path,
)
from asymq.experiments.table2.subject import Subject
from asymq.quantizers import Quantizer

TRAJECTORIES, TRAJECTORY_POINTS = 6, 200


@dataclass
class State:
    """A cell's progress: what a checkpoint holds beside ranges and optimizer."""

    fp_ppl: float
    step: int = 0  # steps taken
    ppl: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    trajectories: dict[str, list] = field(default_factory=dict)  # name: [step, low, high]
    seconds: float = 0.0  # of training
    peak_gib: float | None = None


def run_cell(
    cell: Cell,
    subject: Subject,
    protocol: Protocol,
    out: Path,
    processes: Processes,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Runs what is left of a cell and writes its result. `show` is told of every step's loss."""
    saved = processes.share(lambda: read_checkpoint(checkpoint_path(out, cell)))
    if saved:
        state = State(**saved["state"])
    else:
        state = State(float_perplexity(cell.model, subject, protocol, out, processes))
    gc.collect()  # models of earlier cells, which hold themselves in cycles
    training = Training(cell, subject, protocol, processes, state)
    if saved:
        training.restore(saved)
    else:
        training.calibrate()
    while state.step < protocol.steps:
        loss = training.step()
        show(state.step, loss)
        if not math.isfinite(loss):
            break
        if training.due(protocol.eval_every):
            training.evaluate()
        if training.due(protocol.checkpoint_every):
            training.save(out)
    training.finish(out)


def settings_of(cell: Cell, subject: Subject) -> dict:
    """What a cell's result depends on."""
    settings = subject.settings | ({} if cell.seed is None else {"seed": cell.seed})
    if cell.recipe is None:
        return settings
    own = {key: value for key, value in settings.items() if key not in OF_PAPERS_QUANTIZERS}
    return own | {"recipe": str(cell.recipe)}


def float_perplexity(
    model: str, subject: Subject, protocol: Protocol, out: Path, processes: Processes
) -> float:
    """The float model's, from another cell's result if there is one."""

    def find() -> float | None:
        found = [result["fp_ppl"] for result in read_results(out) if result["model"] == model]
        return next((value for value in found if not isinstance(value, str)), None)

    known = processes.share(find)
    if known is not None:
        return known
    return text.perplexity(processes.place(subject.load()), subject.test, protocol.batch)


class Training:
    """A cell's model and optimizer, and how far they are."""

    def __init__(
        self,
        cell: Cell,
        subject: Subject,
        protocol: Protocol,
        processes: Processes,
        state: State,
    ):
        self.cell, self.subject, self.protocol = cell, subject, protocol
        self.processes, self.state = processes, state
        self.settings = settings_of(cell, subject)
        self.model = asymq.prepare(subject.load(), protocol.config(cell.setting))
        self.model.config.use_cache = False  # type: ignore[union-attr]
        asymq.freeze_weights(self.model)
        processes.place(self.model)
        self.quantizers = dict(asymq.named_quantizers(self.model))
        self.followed = _followed(self.quantizers)
        self.optimizer = torch.optim.Adam(
            asymq.range_parameters(self.model), lr=float(cell.lr), eps=protocol.adam_eps
        )
        # Its wrapper broadcasts the ranges: _begin makes it, once they are set.
        self.replica: nn.Module

    def restore(self, saved: dict) -> None:
        for name, quantizer in self.quantizers.items():
            quantizer.load_state_dict(saved["ranges"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self._begin()

    def calibrate(self) -> None:
        batches = map(self._batch, range(self.protocol.calibration_batches))
        asymq.calibrate(self.model, batches, self.protocol.force_zero)
        self.evaluate()
        self._begin()

    def _begin(self) -> None:
        self.replica = self.processes.replicate(self.model)
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    @property
    def _on_gpu(self) -> bool:
        return self.processes.device.type == "cuda"

    def _batch(self, step: int) -> Tensor:
        return text.batch_of(self.subject.train, step, self.protocol.batch, self.settings["seed"])

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is to be done now; the end has its own."""
        return self.state.step % every == 0 and self.state.step < self.protocol.steps

    def step(self) -> float:
        """Takes a step; its loss."""
        state = self.state
        if state.step % max(1, self.protocol.steps // TRAJECTORY_POINTS) == 0:
            self._follow()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        with _tf32(self.protocol.tf32 and self._on_gpu):
            loss = backward(self.replica, self._batch(state.step), self.processes)
        self.optimizer.step()
        state.losses.append(loss)
        state.step += 1
        state.seconds += time.perf_counter() - start
        return loss

    def evaluate(self) -> None:
        perplexity = text.perplexity(self.model, self.subject.test, self.protocol.batch)
        self.state.ppl[str(self.state.step)] = perplexity

    def save(self, out: Path) -> None:
        self._note_peak()
        body = {
            "settings": self.settings,
            "state": asdict(self.state),
            "ranges": {name: q.state_dict() for name, q in self.quantizers.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        if self.processes.first:
            write(checkpoint_path(out, self.cell), lambda path: torch.save(body, path))

    def finish(self, out: Path) -> None:
        self._follow()
        self.evaluate()
        self._note_peak()
        if self.processes.first:
            ranges = self._ranges()
            write(ranges_path(out, self.cell), lambda path: save_file(ranges, path))
            write(result_path(out, self.cell), json.dumps(self._result()))
            checkpoint_path(out, self.cell).unlink(missing_ok=True)

    def _note_peak(self) -> None:
        """Of all commands that this cell took."""
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.state.peak_gib = round(max(peak, self.state.peak_gib or 0), 2)

    def _ranges(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor.detach().cpu().clone()
            for name, quantizer in self.quantizers.items()
            for key, tensor in quantizer.range_tensors().items()
        }

    def _result(self) -> dict:
        state = self.state
        held = {name: q.collapsed() for name, q in self.quantizers.items()}
        return {
            "model": self.cell.model,
            "parameterization": self.cell.parameterization,
            **({} if self.cell.recipe is None else {"recipe": str(self.cell.recipe)}),
            "lr": float(self.cell.lr),
            "steps": self.settings["steps"],
            "seed": self.settings["seed"],
            "fp_ppl": perplexity_or_word(state.fp_ppl),
            "calibrated_ppl": perplexity_or_word(state.ppl["0"]),
            "ppl": {step: perplexity_or_word(value) for step, value in state.ppl.items()},
            "final_ppl": perplexity_or_word(state.ppl[str(state.step)]),
            "collapsed": {
                name: int(some.sum())
                for name, some in held.items()
                if some is not None and some.any()
            },
            "ranges": sum(q.range_shape.numel() for q in self.quantizers.values()),
            "seconds_per_step": state.seconds / state.step,
            "peak_gib": state.peak_gib,
            **provenance(self.processes.device),
            "settings": self.settings,
            "loss": [finite_or_none(value) for value in state.losses],
            "trajectories": {
                name: [[finite_or_none(value) for value in point] for point in points]
                for name, points in state.trajectories.items()
            },
        }

    def _follow(self) -> None:
        for name, quantizer in self.followed.items():
            if quantizer.live:
                factors = torch.cat([getattr(quantizer, key) for key in quantizer.learned]).detach()
                low, high = factors, factors
            else:
                low, high = quantizer.bounds()
            point = [self.state.step, low.min().item(), high.max().item()]
            self.state.trajectories.setdefault(name, []).append(point)


def backward(forward: nn.Module, batch: Tensor, processes: Processes) -> float:
    """The loss of a batch, shared by the processes; the ranges get the gradients of its mean."""
    ids = processes.rows(batch)
    loss = forward(input_ids=ids, labels=ids).loss
    loss.backward()
    return processes.mean(loss.detach()).item()


@contextmanager
def _tf32(on: bool):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _followed(quantizers: dict[str, Quantizer]) -> dict[str, Quantizer]:
    """A few activations', from the first to the last; those of inputs where no other activation is
    quantized, of weights where none is."""
    kinds: dict[str, list[str]] = {"activation": [], "input": [], "weight": []}
    for name, quantizer in quantizers.items():
        kinds.setdefault(quantizer.kind, []).append(name)
    names = next(names for names in kinds.values() if names)
    last = len(names) - 1
    chosen = [names[i * last // (TRAJECTORIES - 1)] for i in range(TRAJECTORIES)]
    return {name: quantizers[name] for name in chosen}
