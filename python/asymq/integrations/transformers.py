"""`from_pretrained` of folders that prepared models wrote by `save_pretrained`, and a Trainer that
knows learned ranges.

Imported by itself where asymq and transformers are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from asymq.checkpoint import give_quantizers
from asymq.description import DESCRIPTION, read
from asymq.models.pretrained import METHOD, NOTE
from asymq.training import weight_parameters
from asymq.training.ranges import is_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(METHOD)
class AsymqConfig(QuantizationConfigMixin):
    """What config.json says of a folder with quantizers; they are in asymq.json."""

    def __init__(self, **fields):
        self.__dict__.update({**NOTE, **fields})


@register_quantizer(METHOD)
class AsymqQuantizer(HfQuantizer):
    """Prepares the model, which is empty still, as the saved one was; its tensors come by name."""

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "asymq: from_pretrained does not quantize: call asymq.prepare with the model that "
                "it returns"
            )

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if places & {"cpu", "disk"} and places != {"cpu"}:
            raise ValueError(
                "asymq: from_pretrained: device_map leaves a part of the model on the CPU or on "
                "disk, where its weight cannot be read through its quantizer: give it devices "
                "with more memory (max_memory), or 'cpu' alone"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs
    ) -> None:
        if not checkpoint_files:
            raise ValueError(
                "asymq: from_pretrained: needs the folder that save_pretrained wrote, in which "
                f"{DESCRIPTION} names the quantizers; load a state into a prepared model with "
                "load_state_dict"
            )
        path = Path(checkpoint_files[0]).with_name(DESCRIPTION)
        if not path.exists():
            path = _download(model) or path
        if not path.exists():
            raise ValueError(
                f"asymq: from_pretrained: {path.parent} has no {DESCRIPTION}, which names the "
                "quantizers: save the prepared model again, or delete quantization_config in its "
                "config.json to open a float model"
            )
        description = read(path, "asymq: from_pretrained")
        _tie(model)
        give_quantizers(model, description, f"asymq: from_pretrained: {path.parent}")

    def postprocess_model(self, model: PreTrainedModel, **kwargs) -> None:
        """It is a prepared model, which trains, moves and casts as any: what transformers keeps
        quantized models from does not hold for it."""
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _tie(model: PreTrainedModel) -> None:
    """Ties what transformers ties when the weights are there, but quantizers are shared by it."""
    for name, source in model.all_tied_weights_keys.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, model.get_parameter(source))


def _download(model: PreTrainedModel) -> Path | None:
    """Of a repository, of which from_pretrained has taken the files that it knows."""
    config = model.config
    revision = getattr(config, "_commit_hash", None)
    file = cached_file(
        config.name_or_path,
        DESCRIPTION,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    return None if file is None else Path(file)


class RangeTrainerMixin:
    """Before transformers' Trainer, or one made of it: learned ranges without weight decay, for
    whatever optimizer it makes, and with a learning rate of their own.

        class QuantTrainer(RangeTrainerMixin, Trainer):
            range_lr = 1e-3
    """

    range_lr: float | None = None  # None: that of the weights

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        ranges = set(_named_ranges(model))
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in names if name not in ranges]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        given = self.optimizer is not None  # type: ignore[has-type]
        self.optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if self.range_lr is not None and not is_rate(self.range_lr):
            raise ValueError(
                f"{type(self).__name__}: range_lr must be a finite number of at least 0 or None, "
                f"got {self.range_lr!r}"
            )
        if self.range_lr is not None and not given:
            trained = self.model if model is None else model  # type: ignore[attr-defined]
            _give_rate(self.optimizer, list(_named_ranges(trained).values()), self.range_lr)
        return self.optimizer


def _named_ranges(model: nn.Module) -> dict[str, nn.Parameter]:
    """By all their names: a shared quantizer's have several."""
    weights = {id(p) for p in weight_parameters(model)}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in parameters if id(p) not in weights}


def _give_rate(optimizer: Optimizer, ranges: list[nn.Parameter], lr: float) -> None:
    """Moves the ranges out of their groups into such of their own."""
    own = {id(p) for p in ranges}
    for group in list(optimizer.param_groups):
        inside = [p for p in group["params"] if id(p) in own]
        if inside:
            group["params"] = [p for p in group["params"] if id(p) not in own]
            optimizer.add_param_group({**group, "params": inside, "lr": lr})
