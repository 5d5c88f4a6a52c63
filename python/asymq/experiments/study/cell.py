"""One cell: a model is quantized, calibrated, measured, trained, and measured again."""

from __future__ import annotations

import copy
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
    teacher = study.float_model(device)
    model = prepared(teacher, setting.config(), setting)
    calibrate(model, setting, study, cell.seed)
    before = measure(model, teacher, study)
    loss_of = loss_function(model, teacher, setting)
    losses, seconds = train(
        groups_of(model, setting), loss_of, setting, study, cell.seed, device, show
    )
    after = measure(model, teacher, study)
    result = result_of(before, after, losses, seconds, study, device)
    result["collapsed"] = sum(
        int(held.sum())
        for _, quantizer in asymq.named_quantizers(model)
        if (held := quantizer.collapsed()) is not None
    )
    write(result_path(out, cell), json.dumps(result))


def result_of(
    before: dict,
    after: dict,
    losses: list[float],
    seconds: float | None,
    study: Study,
    device: torch.device,
) -> dict:
    return {
        **{key: {"calibrated": before[key], "learned": after[key]} for key in before},
        "float_perplexity": study.float_perplexity(device),
        "seconds_per_step": None if seconds is None else round(seconds, 5),
        **provenance(device),
        "settings": study.settings,
        "loss": [finite_or_none(float(f"{loss:.5g}")) for loss in losses],
    }


def prepared(float_model: nn.Module, config: asymq.QuantConfig, setting: Setting) -> nn.Module:
    """A copy with quantizers, not calibrated; its weights frozen unless they are to learn."""
    model = asymq.prepare(copy.deepcopy(float_model), config)
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


def groups_of(model: nn.Module, setting: Setting) -> list[dict]:
    """What the optimizer gets: the ranges, and the weights where they learn."""
    groups = asymq.range_parameters(model, lr=float(setting.rate))
    if setting.weights != FROZEN:
        groups.append({"params": asymq.weight_parameters(model), "lr": float(setting.weights)})
    return groups


def train(
    groups: list[dict],
    loss_of: Callable[[Tensor], Tensor],
    setting: Setting,
    study: Study,
    seed: int,
    device: torch.device,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[list[float], float | None]:
    """Losses, up to one that is not finite, and seconds a step (None: there is none that is timed).
    loss_of: of token ids."""
    optimizer = (torch.optim.Adam if setting.optimizer == "adam" else torch.optim.SGD)(groups)
    losses: list[float] = []
    warm, seconds = min(WARM, setting.steps - 1), 0.0
    for number in range(setting.steps):
        ids = study.batch(number, seed).to(device)
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if number >= warm:
            seconds += time.perf_counter() - began
        show(number + 1, losses[-1])
        if not math.isfinite(losses[-1]):
            break
    timed = len(losses) - warm
    return losses, seconds / timed if timed > 0 else None


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
