"""A prepared model on disk: `model.safetensors` and `asymq.json`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asymq.config import QuantConfig
from asymq.description import DESCRIPTION, describe, encode, read, whole_tensors
from asymq.models.root import Prepared
from asymq.preparation import carry_out, plan_of
from asymq.quantizers import elements, is_split, named_quantizers
from asymq.wrappers import unwrap

WEIGHTS = "model.safetensors"


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes a prepared model into `folder` (made if it is not there), tied weights once.

    The files appear complete or not at all. Of a wrapped model (torch.compile, DDP, AveragedModel)
    the model itself is saved. Of one that FSDP2 has split, every process must call this; the first
    one writes. ValueError: the model has no quantizers.
    """
    model = unwrap(model)
    description = describe(model)
    if not description["quantizers"]:
        raise ValueError("asymq.save: the model has no quantizers; call asymq.prepare first")
    split = any(map(is_split, model.parameters()))
    tensors = whole_tensors(model)
    if not split or dist.get_rank() == 0:
        _write(Path(folder), tensors, description)
    if split:
        dist.barrier()


def _write(folder: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    with whole_files(folder, last=DESCRIPTION) as work:
        save_file(tensors, str(work / WEIGHTS), metadata={"format": "pt"})
        (work / DESCRIPTION).write_text(encode(description))


@contextmanager
def whole_files(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write into. At the end of the block its files go into `folder` (made if it is not
    there), the one called `last` after the others; after an error none of them does."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    work = Path(tempfile.mkdtemp(prefix=f".saving-{os.getpid()}-", dir=folder))
    try:
        yield work
        for path in sorted(work.iterdir(), key=lambda path: path.name == last):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _remove_leftovers(folder: Path) -> None:
    """Of processes that were killed while they saved."""
    for leftover in folder.glob(".saving-*"):
        process = leftover.name.split("-")[1]
        if not (process.isdigit() and Path(f"/proc/{process}").exists()):
            shutil.rmtree(leftover, ignore_errors=True)


def load(folder: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote, or `save_pretrained`, in evaluation mode on the CPU.

    model: a float model of the saved class, needed where it is not one of transformers; it is
    prepared in place, unless its layers have their quantizers already. ValueError: not such a
    folder, a file that is incomplete or of a later version, no model given, or one of another
    structure.
    """
    folder = Path(folder)
    description = read(folder / DESCRIPTION, "asymq.load")
    if model is None:
        model = _float_model(description)
    give_quantizers(model, description, f"asymq.load: {folder}")
    try:
        state = _read_tensors(folder)
        _take_dtypes(model, state)
        model.load_state_dict(_with_ties(state, model))
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 400 else f"{reason[:400]} ..."
        raise ValueError(f"asymq.load: {folder / WEIGHTS} does not load: {reason}") from error
    return model.eval()


def give_quantizers(model: nn.Module, description: dict[str, Any], what: str) -> None:
    """Puts exactly the quantizers of `description` into `model`, unless it has them. ValueError, in
    which `what` names the folder: they do not fit."""
    own = dict(named_quantizers(model))
    specs = {k: v for k, v in description["quantizers"].items() if k not in own}
    if isinstance(model, Prepared) or not specs:
        return
    try:
        # What is not quantized was said when the model was first prepared.
        carry_out(plan_of(model, QuantConfig(overrides=specs)), allow_lookahead=True)
    except ValueError as error:
        raise ValueError(
            f"{what} holds a {description['class']}, which this {type(model).__name__} does not "
            f"fit: {error}"
        ) from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Of one file, or of the several that transformers makes of a large model."""
    files, index = [WEIGHTS], folder / f"{WEIGHTS}.index.json"
    if index.exists() and not (folder / WEIGHTS).exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    state: dict[str, Tensor] = {}
    for name in files:
        state |= load_file(str(folder / name))
    return state


def _float_model(description: dict[str, Any]) -> nn.Module:
    import transformers

    name, config = description["class"], description["config"]
    cls = getattr(transformers, name, None)
    if cls is None or config is None:
        raise ValueError(
            f"asymq.load: {name} is not a model of transformers: pass a float model of that class"
        )
    dtype = getattr(torch, description["dtype"])
    model = cls._from_config(cls.config_class.from_dict(config), dtype=dtype)
    if description["generation_config"] is not None:
        generation = transformers.GenerationConfig.from_dict(description["generation_config"])
        model.generation_config = generation
    return model


@torch.no_grad()
def _take_dtypes(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives each tensor of the model the dtype that it was saved with."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in state and state[name].dtype != tensor.dtype:
            tensor.data = tensor.data.to(state[name].dtype)


def _with_ties(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state with the names, too, that the model has of tensors that it ties."""
    own = model.state_dict()
    stored = {elements(own[name]): name for name in state if name in own}
    ties = {name: stored.get(elements(tensor)) for name, tensor in own.items()}
    return state | {name: state[other] for name, other in ties.items() if other is not None}
