"""A prepared model on disk: `model.safetensors` and `asymq.json`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from asymq.preparation import prepare
from asymq.quantizer import named_quantizers
from asymq.specs import QuantConfig, QuantSpec

WEIGHTS, DESCRIPTION = "model.safetensors", "asymq.json"
FORMAT = 1


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes a prepared model into `folder` (made if it is not there), tied weights once.

    The files appear complete or not at all. ValueError: the model has no quantizers.
    """
    specs = {name: quantizer.spec.to_dict() for name, quantizer in named_quantizers(model)}
    if not specs:
        raise ValueError("asymq.save: the model has no quantizers; call asymq.prepare first")
    description = {
        "format": FORMAT,
        "class": type(model).__name__,
        "dtype": str(_weight_dtype(model)).removeprefix("torch."),
        "config": _settings(model, "config"),
        "generation_config": _settings(model, "generation_config"),
        "quantizers": specs,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        save_model(model, str(work / WEIGHTS))
        (work / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        for name in (WEIGHTS, DESCRIPTION):
            os.replace(work / name, folder / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def load(folder: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote, in evaluation mode on the CPU.

    model: a float model of the saved class, needed where it is not one of transformers; it is
    prepared in place, unless its layers have their quantizers already. ValueError: not such a
    folder, a file that is incomplete, no model given.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        if description["format"] != FORMAT:
            raise KeyError(f"format {description['format']}, this version reads {FORMAT}")
        specs = {k: QuantSpec.from_dict(v) for k, v in description["quantizers"].items()}
        if model is None:
            model = _float_model(description)
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"asymq.load: {folder} holds no model saved by asymq: {error}") from None
    if not any(named_quantizers(model)):
        # Exactly the saved quantizers, by name.
        prepare(model, QuantConfig(None, None, None, overrides=specs), allow_lookahead=True)
    try:
        load_model(model, str(folder / WEIGHTS))
    except Exception as error:
        raise ValueError(f"asymq.load: {folder / WEIGHTS} does not load: {error}") from error
    return model.eval()


def _float_model(description: dict) -> nn.Module:
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


def _settings(model: nn.Module, name: str) -> dict | None:
    """transformers' settings of a model; None where there are none, or they are something else."""
    settings = getattr(model, name, None)
    return settings.to_dict() if hasattr(settings, "to_dict") else None


def _weight_dtype(model: nn.Module) -> torch.dtype:
    ranges = {id(p) for _, q in named_quantizers(model) for p in q.parameters()}
    return next(p.dtype for p in model.parameters() if id(p) not in ranges)
