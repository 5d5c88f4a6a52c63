"""The model and the text of a study, and what all of its cells share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from asymq.experiments.common import text
from asymq.experiments.common.command import check_options, integer, option
from asymq.experiments.common.files import BadInput
from asymq.experiments.table2 import protocol as table2
from asymq.experiments.table2.subject import Subject, open_subject


def _protocol(*given, **more):
    return option(*given, group="protocol", **more)


@dataclass(frozen=True)
class Protocol:
    """What all cells share. BadInput: a value is not allowed."""

    batch: int = _protocol(8, "windows a step", integer(1), metavar="N")
    context: int = _protocol(512, "tokens a window", integer(2), metavar="N")
    windows: int = _protocol(
        96,
        "of the test text for perplexity, and as many of the training text, which nothing learns "
        "from, for the divergence from the float model",
        integer(1),
        metavar="N",
    )
    calibration_batches: int = _protocol(8, "", integer(1), metavar="N")
    tf32: bool = _protocol(True, "TF32 matrix products on a GPU (default)")

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class Study:
    """A subject whose windows are shared out: to learn from, for the divergence (`held_out`), for
    perplexity (`subject.test`)."""

    subject: Subject
    held_out: Tensor
    protocol: Protocol
    _perplexities: dict[torch.device, float] = field(default_factory=dict, repr=False)

    @property
    def settings(self) -> dict:
        """What every result depends on beside its cell."""
        return asdict(self.protocol) | self.subject.settings

    def float_model(self, device: torch.device) -> nn.Module:
        """Read once in a process: it stays as it is. From now on matrix products on a GPU are as
        precise as the protocol says."""
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.protocol.tf32 else "highest")
        return _read(self.subject.name, device)

    def float_perplexity(self, device: torch.device) -> float:
        """Of the float model, found once in a process."""
        if device not in self._perplexities:
            model, test = self.float_model(device), self.subject.test
            self._perplexities[device] = text.perplexity(model, test, self.protocol.batch)
        return self._perplexities[device]

    def batch(self, step: int, seed: int) -> Tensor:
        return text.batch_of(self.subject.train, step, self.protocol.batch, seed)


@lru_cache(maxsize=1)
def _read(name: str, device: torch.device) -> nn.Module:
    nothing = torch.empty(0)
    model = Subject(name, nothing, nothing, {}).load().to(device)
    model.config.use_cache = False  # type: ignore[union-attr]
    return model


def open_study(
    model: str,
    data: str | None,
    train_text: Path | None,
    test_text: Path | None,
    protocol: Protocol,
    recipes: list[str],
) -> Study:
    """BadInput: no such model or text, or one too short; a recipe that does not fit the model."""
    train, test = text.read(data, train_text, test_text)
    of_table2 = table2.Protocol(context=protocol.context, batch=protocol.batch)
    settings = ["beta_gamma" if name == table2.PAPERS_SETTING else name for name in recipes]
    opened = open_subject(model, train, test, of_table2, settings)
    most = len(opened.train) - protocol.batch
    if protocol.windows > most:
        raise BadInput(
            f"--windows {protocol.windows}: the training text has {len(opened.train)} windows, and "
            f"a batch of {protocol.batch} must be left to learn from; give a longer text or at "
            f"most {max(most, 0)}"
        )
    kept = ("train_text_sha256", "test_text_sha256", "model_sha256")
    subject = Subject(
        model,
        opened.train[: -protocol.windows],
        opened.test[: protocol.windows],
        {key: opened.settings[key] for key in kept},
    )
    return Study(subject, opened.train[-protocol.windows :], protocol)
