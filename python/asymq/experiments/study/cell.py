"""One cell: a model is quantized, calibrated, measured, trained, and measured again."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import asymq
from asymq.experiments.common import text
from asymq.experiments.common.files import write
from asymq.experiments.common.processes import Processes
from asymq.experiments.common.provenance import provenance
from asymq.experiments.study.results import result_path
from asymq.experiments.study.setting import FROZEN, LSQ, Cell, Setting
from asymq.experiments.study.subject import Study
from asymq.experiments.table2.results import finite_or_none

WARM = 3  # steps that are not timed


def run_cell(
    cell: Cell,
    study: Study,
    out: Path,
    processes: Processes,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains and writes the result. `show` is told of every step's loss."""
    gc.collect()  # models of earlier cells, which hold themselves in cycles
    device, setting = processes.device, cell.setting
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if study.protocol.tf32 else "highest")
    teacher = study.subject.load().to(device)
    model = prepared(setting, study).to(device)
    calibrate(model, setting, study, cell.seed)
    before = measure(model, teacher, study)
    losses, seconds = train(model, teacher, cell, study, show)
    after = measure(model, teacher, study)
    result = {
        **{key: {"calibrated": before[key], "learned": after[key]} for key in before},
        "float_perplexity": text.perplexity(teacher, study.subject.test, study.protocol.batch),
        "seconds_per_step": round(seconds, 5),
        "collapsed": sum(
            int(held.sum())
            for _, quantizer in asymq.named_quantizers(model)
            if (held := quantizer.collapsed()) is not None
        ),
        **provenance(device),
        "settings": study.settings,
        "loss": [finite_or_none(float(f"{loss:.5g}")) for loss in losses],
    }
    write(result_path(out, cell), json.dumps(result))


def prepared(setting: Setting, study: Study) -> nn.Module:
    """On the CPU, not calibrated; its weights frozen unless they are to learn."""
    model = asymq.prepare(study.subject.load(), setting.config())
    model.config.use_cache = False  # type: ignore[union-attr]
    if setting.weights == FROZEN:
        asymq.freeze_weights(model)
    return model


def calibrate(model: nn.Module, setting: Setting, study: Study, seed: int) -> None:
    device = next(model.parameters()).device
    method = "lsq" if setting.form == LSQ else setting.calibration
    batches = (
        study.batch(step, seed).to(device) for step in range(study.protocol.calibration_batches)
    )
    asymq.calibrate(model, batches, method=method, weight_method=method)


def train(
    model: nn.Module,
    teacher: nn.Module,
    cell: Cell,
    study: Study,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[list[float], float]:
    """Losses, up to one that is not finite, and seconds a step."""
    setting = cell.setting
    loss_of = loss_function(model, teacher, setting)
    step = Stepper(model, setting)
    losses: list[float] = []
    device, seconds = next(model.parameters()).device, 0.0
    for number in range(setting.steps):
        ids = study.batch(number, cell.seed).to(device)
        began = time.perf_counter()
        losses.append(step(loss_of(ids)))
        if number >= min(WARM, setting.steps - 1):
            seconds += time.perf_counter() - began
        show(number + 1, losses[-1])
        if not math.isfinite(losses[-1]):
            break
    return losses, seconds / max(1, len(losses) - min(WARM, setting.steps - 1))


class Stepper:
    """Backward and a step of the optimizer; the loss as a number."""

    def __init__(self, model: nn.Module, setting: Setting):
        groups = asymq.range_parameters(model, lr=float(setting.rate))
        if setting.weights != FROZEN:
            groups.append({"params": asymq.weight_parameters(model), "lr": float(setting.weights)})
        kind = torch.optim.Adam if setting.optimizer == "adam" else torch.optim.SGD
        self.optimizer = kind(groups)

    def __call__(self, loss: Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def loss_function(
    model: nn.Module, teacher: nn.Module, setting: Setting
) -> Callable[[Tensor], Tensor]:
    """Of token ids. Where weights learn, the teacher is the float copy, else the model itself with
    its quantizers off."""
    if setting.loss == "ce":
        return lambda ids: model(input_ids=ids, labels=ids).loss
    distillation = asymq.SelfDistillation(
        model,
        cross_entropy=1.0 if setting.loss == "ce+kl" else 0.0,
        teacher=None if setting.weights == FROZEN else teacher,
    )
    return lambda ids: distillation(input_ids=ids, labels=ids)


def measure(model: nn.Module, teacher: nn.Module, study: Study) -> dict[str, float | None]:
    """The perplexity of the test text's windows, and the mean KL divergence from the float model
    (nats a token) on the held-out windows. None: not finite."""
    size = study.protocol.batch
    return {
        "perplexity": finite_or_none(text.perplexity(model, study.subject.test, size)),
        "kl": finite_or_none(divergence(model, teacher, study.held_out, size)),
    }


@torch.no_grad()
def divergence(model: nn.Module, teacher: nn.Module, windows: Tensor, batch: int) -> float:
    """Σ p·(log p - log q), the mean over all tokens; p the teacher's, q the model's."""
    device, total = next(model.parameters()).device, 0.0
    for ids in windows.split(batch):
        ids = ids.to(device)
        p, q = (
            of(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            for of in (teacher, model)
        )
        total += F.kl_div(q, p, reduction="sum", log_target=True).item()
    return total / windows.numel()
