"""A model as a checkpoint of compressed-tensors, which transformers and vLLM load."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from asymq._build import VERSION
from asymq.checkpoint import WEIGHTS, whole_files
from asymq.description import describe
from asymq.export.common import need_extra, quantizers_of
from asymq.export.grids import Grid, spread
from asymq.export.report import ExportReport
from asymq.export.schemes import PACKED, Packed, Plan, in_files, zero_point
from asymq.models.sites import is_adapter
from asymq.quantizers import Quantizer, elements
from asymq.wrappers import pretrained_models

WHAT = "asymq.export_checkpoint"
METHOD = "compressed-tensors"
CONFIG = "config.json"
_INDEX = f"{WEIGHTS}.index.json"
_OF_A_MODEL = (CONFIG, "generation_config.json", _INDEX)
_LARGEST_FILE = "5GB"
# In the metadata of the weights, by which an export knows what it may replace.
_MARK = "asymq"


def export_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    format: str = METHOD,
    activations: str = "refuse",
) -> ExportReport:
    """Writes a model of transformers with integer weights into `folder`, from where transformers
    and vLLM load it: config.json, model.safetensors (in shards of 5 GB), generation_config.json.
    The tokenizer is the user's to add: ``tokenizer.save_pretrained(folder)``.

    format: "compressed-tensors". Weights of nn.Linear, and those of experts one by one, are stored
    as the codes that they were trained with, 2 to 7 bits packed, 8 bits as int8, with float32
    scales. Embeddings, norms, the head of a language model and tied weights are stored as the float
    values of their codes, tied ones once.

    activations: what becomes of the quantizers of activations. "refuse": there must be none.
    "drop": they are left out, with a warning. "dynamic": PerToken inputs of these Linears are
    written as dynamic input_activations. The format has no factors: β and γ must be 1, as
    ``QuantSpec(learn=False)`` keeps them; quantizers other than inputs are refused. "drop_factors":
    as "dynamic", but factors, and inputs of layers that are stored in float, are left out with a
    warning.

    transformers reads packed zero points (asymmetric weights of 2 to 7 bits, per channel or group)
    only with ``quantization_config=CompressedTensorsConfig(dequantize=True)``. Without that, it
    rounds scales to the dtype of the model. The report says of each quantizer what is not as it
    was trained.

    The model is left as it was. The files appear complete or not at all, and replace those of an
    earlier export alone.

    ImportError: a package of asymq[checkpoint] is missing. RuntimeError: a range that is not set.
    ValueError: not a model of transformers, or one with adapters; a quantizer that is off; what the
    format cannot hold (weights of other layers, more than 8 bits, ranges along another axis than
    the reduction's, a weight's dynamic range, a zero point that is no code, activations as above);
    a folder with another model. Nothing is written then.
    """
    pack = _packing()
    if format != METHOD:
        raise ValueError(f"{WHAT}: format must be {METHOD!r}, got {format!r}")
    model, quantizers = quantizers_of(model, WHAT)
    _need_pretrained(model)
    plan = Plan(model, quantizers, WHAT)
    plan.place_weights()
    plan.place_activations(activations)
    quantization = {"quant_method": METHOD, **plan.quantization()}
    folder = Path(folder)
    replaced = _replaceable(folder)
    files = _write(model, _tensors(model, plan, pack), quantization, folder, replaced)
    for sentence in plan.warnings:
        warnings.warn(f"{WHAT}: {sentence}", stacklevel=2)
    return ExportReport(list(plan.rows.values()), files)


def _packing() -> Callable[..., Tensor]:
    """compressed-tensors' own function."""
    try:
        import transformers  # noqa: F401
        from compressed_tensors.compressors import pack_to_int32
    except ImportError as error:
        raise need_extra(WHAT, "checkpoint", error) from None
    return pack_to_int32


def _need_pretrained(model: Any) -> None:
    what = f"{WHAT}: this {type(model).__name__}"
    if any(map(is_adapter, model.modules())):
        raise ValueError(
            f"{what} has adapters of peft, which are not in its weights: merge them first "
            "(merge_and_unload)"
        )
    if model not in pretrained_models(model):
        raise ValueError(
            f"{what} is no model of transformers, which loads no other: export the one within it, "
            "or use asymq.export_onnx"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, source in model.all_tied_weights_keys.items():
        if not _are_one(parameters.get(name), parameters.get(source)):
            raise ValueError(
                f"{what} has {name} and {source} as two tensors, which its configuration ties when "
                "it is loaded: tie them (model.tie_weights()), or set "
                "model.config.tie_word_embeddings to False and open it again with asymq.load"
            )


def _are_one(a: Tensor | None, b: Tensor | None) -> bool:
    return a is None or b is None or elements(a) == elements(b)


@torch.no_grad()
def _tensors(model: Any, plan: Plan, pack: Callable[..., Tensor]) -> dict[str, Tensor]:
    """What the files hold, by name, on the CPU."""
    modules = model.named_modules(remove_duplicate=False)
    ranges = {name for name, module in modules if isinstance(module, Quantizer)}
    packed = {elements(weight.parameter) for weight in plan.packed}
    floats: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tied = model.all_tied_weights_keys.get(name) in floats
        if tied or name.rpartition(".")[0] in ranges or elements(tensor) in packed:
            continue
        quantizer = plan.floats.get(elements(tensor))
        if quantizer is not None:
            tensor = Grid.of(quantizer).values(tensor).to(tensor.dtype)
        floats[name] = tensor.cpu()
    tensors = in_files(model, floats)
    for weight in plan.packed:
        tensors |= _integers(model, weight, pack)
    # Each with memory of its own: what is not tied when it is loaded is there several times.
    own = torch.contiguous_format
    return {name: tensor.detach().clone(memory_format=own) for name, tensor in tensors.items()}


def _integers(model: Any, weight: Packed, pack: Callable[..., Tensor]) -> dict[str, Tensor]:
    grid, bits = Grid.of(weight.quantizer), weight.quantizer.spec.bits
    codes, scale = grid.codes(weight.parameter), grid.scale.cpu()
    extra = {}
    if grid.offset is not None:
        zero = zero_point(grid)
        codes = codes + spread(zero, codes.shape)
        zero = zero.to(torch.int8).cpu()
        extra["zero_point"] = pack(zero, bits, packed_dim=0) if weight.packs_zero_point else zero
    parts = in_files(model, {weight.name: codes.to(torch.int8).cpu()})
    scales = dict.fromkeys(parts, scale)
    if weight.of_experts:
        scales = in_files(model, {weight.name: scale.expand(*codes.shape[:2], -1)})
    tensors = {}
    for name, part in parts.items():
        if weight.format == PACKED:
            tensors[f"{name}_packed"] = pack(part, bits)
            tensors[f"{name}_shape"] = torch.tensor(part.shape)
        else:
            tensors[name] = part
        tensors[f"{name}_scale"] = scales[name]
        tensors |= {f"{name}_{key}": tensor for key, tensor in extra.items()}
    return tensors


# ---- the folder ----------------------------------------------------------------------------------


def _replaceable(folder: Path) -> list[Path]:
    """The files of an earlier export. ValueError: what is there is not one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{WHAT}: {folder} is a file: give a folder")
    weights = [path for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}")]
    files = [path for name in _OF_A_MODEL if (path := folder / name).exists()] + weights
    if files and not (weights and all(map(_is_own, weights))):
        raise ValueError(
            f"{WHAT}: {folder} holds {', '.join(path.name for path in files[:3])} of a model that "
            "no export has written: give another folder"
        )
    return files


def _is_own(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return _MARK in (file.metadata() or {})
    except SafetensorError:
        return False


def _write(
    model: Any,
    tensors: dict[str, Tensor],
    quantization: dict[str, Any],
    folder: Path,
    replaced: list[Path],
) -> tuple[Path, ...]:
    from huggingface_hub import split_torch_state_dict_into_shards

    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=_LARGEST_FILE)
    description, config = describe(model), deepcopy(model.config)
    config.quantization_config = quantization
    config.architectures, config.dtype = [description["class"]], description["dtype"]
    with whole_files(folder, last=CONFIG) as work:
        for file, names in shards.filename_to_tensors.items():
            part = {name: tensors[name] for name in names}
            save_file(part, str(work / file), metadata={"format": "pt", _MARK: VERSION})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (work / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
        if model.can_generate():
            model.generation_config.save_pretrained(work)
        config.save_pretrained(work)
        written = sorted(path.name for path in work.iterdir())
        # The configuration comes back last: a folder without it is none that loads.
        for path in replaced:
            path.unlink()
    return tuple(folder / name for name in written)
