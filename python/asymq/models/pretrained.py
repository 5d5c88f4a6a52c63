"""What any model of transformers does with its quantizers when it is saved, and generates."""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from asymq.description import DESCRIPTION, describe, encode, whole_tensors
from asymq.layers import Quantized
from asymq.models.sites import is_adapter
from asymq.quantizers import generating, is_split

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

METHOD = "asymq"
# In config.json: by its method transformers knows who opens the folder.
NOTE = {
    "quant_method": METHOD,
    "note": "asymq.json names the quantizers of this model: import asymq before from_pretrained, "
    "which opens a float model without them otherwise",
}


class QuantPreTrained(Quantized):
    """A model of transformers that saves its quantizers, too, and quantizes its weights once for
    all tokens that it generates."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its models
        config: PreTrainedConfig

    @classmethod
    def own_members(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        if not hasattr(float_class, "generate"):
            return {}

        # Whoever looks behind transformers' own decorator, no_grad, finds what is behind that.
        @functools.wraps(inspect.unwrap(float_class.generate))
        def generate(self, *args, **kwargs):
            if any(map(is_split, self.parameters())):  # weights are whole for a moment only
                return float_class.generate(self, *args, **kwargs)
            with generating():
                return float_class.generate(self, *args, **kwargs)

        return {"generate": generate}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        *args,
        **kwargs,
    ) -> None:
        """As transformers, and asymq.json: where asymq is imported, from_pretrained of that folder
        returns this model with its quantizers and their ranges.

        Of a model that FSDP2 has split, every process must call this; the first one writes.
        ValueError, before anything is written: adapters of peft in it, another quantization of
        transformers, a distributed checkpoint.
        """
        if getattr(self, "_hf_peft_config_loaded", False):  # writes the adapters alone
            super().save_pretrained(  # type: ignore[misc]
                save_directory, is_main_process, state_dict, *args, **kwargs
            )
            return
        self._check_savable(kwargs.get("distributed_checkpoint", False))
        split = any(map(is_split, self.parameters()))
        if split and state_dict is None:
            state_dict = whole_tensors(self)
            is_main_process = is_main_process and dist.get_rank() == 0
        description = describe(self)
        before = vars(self.config).get("quantization_config")
        self.config.quantization_config = NOTE
        # Under the names that the model has: those of quantizers are made of them.
        kwargs.setdefault("save_original_format", False)
        try:
            super().save_pretrained(  # type: ignore[misc]
                save_directory, is_main_process, state_dict, *args, **kwargs
            )
        finally:
            if before is None:
                del self.config.quantization_config
            else:
                self.config.quantization_config = before
        if is_main_process:
            (Path(save_directory) / DESCRIPTION).write_text(encode(description))

    def _check_savable(self, distributed_checkpoint: bool) -> None:
        what = f"asymq: save_pretrained of this {type(self).__name__}"
        if any(map(is_adapter, self.modules())):
            raise ValueError(
                f"{what}: it has adapters of peft: save those by the PeftModel's save_pretrained, "
                "merge them (merge_and_unload), or write all of it with asymq.save"
            )
        other = getattr(self, "hf_quantizer", None)
        if other is not None:
            method = other.quantization_config.quant_method
            raise ValueError(
                f"{what}: config.json names one quantization method, and the model has that of "
                f"{getattr(method, 'value', method)}, too: write it with asymq.save"
            )
        if distributed_checkpoint:
            raise ValueError(
                f"{what}: from_pretrained opens no quantizers from a distributed checkpoint: leave "
                "distributed_checkpoint out, or use torch.distributed.checkpoint"
            )
