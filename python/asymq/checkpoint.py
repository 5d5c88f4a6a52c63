"""A prepared model on disk: `model.safetensors` and `asymq.json`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asymq.config import QuantConfig
from asymq.models.root import Prepared
from asymq.preparation import prepare
from asymq.quantizers import QuantSpec, elements, is_split, named_quantizers
from asymq.wrappers import unwrap

WEIGHTS, DESCRIPTION = "model.safetensors", "asymq.json"
FORMAT = 1
_FIELDS = {"format", "class", "dtype", "config", "generation_config", "quantizers"}


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes a prepared model into `folder` (made if it is not there), tied weights once.

    The files appear complete or not at all. Of a wrapped model (torch.compile, DDP, AveragedModel)
    the model itself is saved. Of one that FSDP2 has split, every process must call this; the first
    one writes. ValueError: the model has no quantizers.
    """
    model = unwrap(model)
    specs = {name: quantizer.spec.to_dict() for name, quantizer in named_quantizers(model)}
    if not specs:
        raise ValueError("asymq.save: the model has no quantizers; call asymq.prepare first")
    description = {
        "format": FORMAT,
        "class": type(model).__name__.removeprefix("FSDP"),
        "dtype": str(_weight_dtype(model)).removeprefix("torch."),
        "config": _settings(model, "config"),
        "generation_config": _settings(model, "generation_config"),
        "quantizers": specs,
    }
    split = any(map(is_split, model.parameters()))
    tensors = _tensors(model)
    if not split or dist.get_rank() == 0:
        _write(Path(folder), tensors, description)
    if split:
        dist.barrier()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state, tied tensors once under their first name."""
    state: dict[str, Tensor] = {}
    first: dict[int | tuple, str] = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if is_split(tensor) else tensor
        key = id(tensor) if tensor is not whole else elements(whole)
        if first.setdefault(key, name) == name:
            state[name] = whole.contiguous()
    return state


def _write(folder: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    work = Path(tempfile.mkdtemp(prefix=f".saving-{os.getpid()}-", dir=folder))
    try:
        save_file(tensors, str(work / WEIGHTS), metadata={"format": "pt"})
        (work / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        for name in (WEIGHTS, DESCRIPTION):
            os.replace(work / name, folder / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Of processes that were killed while they saved."""
    for leftover in folder.glob(".saving-*"):
        process = leftover.name.split("-")[1]
        if not (process.isdigit() and Path(f"/proc/{process}").exists()):
            shutil.rmtree(leftover, ignore_errors=True)


def load(folder: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote, in evaluation mode on the CPU.

    model: a float model of the saved class, needed where it is not one of transformers; it is
    prepared in place, unless its layers have their quantizers already. ValueError: not such a
    folder, a file that is incomplete or of a later version, no model given, or one of another
    structure.
    """
    folder = Path(folder)
    description = _read_description(folder)
    try:
        specs = {k: QuantSpec.from_dict(v) for k, v in description["quantizers"].items()}
    except ValueError as error:
        raise ValueError(f"asymq.load: {folder / DESCRIPTION}: {error}") from None
    if model is None:
        model = _float_model(description)
    own = dict(named_quantizers(model))
    if not isinstance(model, Prepared) and specs.keys() - own.keys():
        # Exactly the saved quantizers, by name.
        overrides = {name: spec for name, spec in specs.items() if name not in own}
        try:
            prepare(model, QuantConfig(overrides=overrides), allow_lookahead=True)
        except ValueError as error:
            raise ValueError(
                f"asymq.load: {folder} holds a {description['class']}, which this "
                f"{type(model).__name__} does not fit: {error}"
            ) from None
    try:
        state = load_file(str(folder / WEIGHTS))
        _take_dtypes(model, state)
        model.load_state_dict(_with_ties(state, model))
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 400 else f"{reason[:400]} ..."
        raise ValueError(f"asymq.load: {folder / WEIGHTS} does not load: {reason}") from error
    return model.eval()


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        missing = sorted(_FIELDS - description.keys())
    except (OSError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"asymq.load: {folder} holds no model saved by asymq: {error}") from None
    if description.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"asymq.load: {path} has the format {description['format']!r}, this version of asymq "
            f"reads {FORMAT}: use the version that saved it, or a later one"
        )
    if missing:
        raise ValueError(
            f"asymq.load: {folder} holds no model saved by asymq: {path} lacks {', '.join(missing)}"
        )
    return description


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


def _settings(model: nn.Module, name: str) -> dict | None:
    """transformers' settings of a model; None where there are none, or they are something else."""
    to_dict = getattr(getattr(model, name, None), "to_dict", None)
    return None if to_dict is None else to_dict()


def _weight_dtype(model: nn.Module) -> torch.dtype:
    ranges = {id(p) for _, q in named_quantizers(model) for p in q.parameters()}
    weights = (p.dtype for p in model.parameters() if id(p) not in ranges)
    return next(weights, torch.float32)
