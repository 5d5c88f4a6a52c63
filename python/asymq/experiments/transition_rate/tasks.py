"""What is learned: a float model to start from, batches that are a function of seed and step, and a
score."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import asymq
from asymq.experiments.common import text
from asymq.experiments.common.files import BadInput, first_line, write
from asymq.experiments.transition_rate.protocol import Defaults, Protocol

CALIBRATION_BATCHES = 8


class Task(ABC):
    """protocol: without None where defaults are. settings: what results depend on beside what a
    run is called."""

    label: str
    metric: str  # of the score
    higher_is_better: bool
    protocol: Protocol

    @property
    def settings(self) -> dict:
        return {"task": self.label, **asdict(self.protocol)}

    def make(self, seeds: Sequence[int]) -> None:  # noqa: B027
        """Leaves what `quantized` needs on disk, once for all processes."""

    @abstractmethod
    def quantized(self, bits: int, seed: int) -> nn.Module:
        """The float model with quantizers that are not calibrated. BadInput: it cannot be."""

    @abstractmethod
    def batch(self, step: int, seed: int, device: torch.device) -> tuple[Tensor, ...]:
        """The batch of a step, from 0."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor: ...

    @abstractmethod
    def score(self, model: nn.Module, device: torch.device) -> float: ...

    def calibrate(self, model: nn.Module, seed: int, device: torch.device) -> None:
        """Ranges of activations from the first batches, and those of weights, at few bits narrower
        than the weights, where they change the weights least."""
        batches = (self.batch(step, seed, device)[0] for step in range(CALIBRATION_BATCHES))
        asymq.calibrate(model, batches)
        for weight in asymq.training.codes.coded_weights(model):
            _narrow(weight.quantizer, weight.parameter)


@torch.no_grad()
def _narrow(quantizer: asymq.quantizers.Quantizer, weight: Tensor) -> None:
    low, high = quantizer.extrema(weight)
    high = torch.maximum(-low, high).clamp(min=1e-8)

    def error(part: float) -> float:
        quantizer.set_range(-part * high, part * high)
        return (quantizer.fake_quantize(weight) - weight).square().sum().item()

    best = min((i / 20 for i in range(4, 21)), key=error)
    quantizer.set_range(-best * high, best * high)


# ---- digits ------------------------------------------------------------------------------------


@dataclass
class Digits(Task):
    """scikit-learn's digits, 1,797 images of 8 x 8, of which 497 are held out; each seed has a
    float model of its own. Images to learn from are shifted by up to one pixel."""

    protocol: Protocol
    folder: Path  # of the float models
    label: str = "digits"
    metric: str = "accuracy, %"
    higher_is_better: bool = True
    float_steps: int = 400

    DEFAULTS = Defaults(steps=600, batch=64, activations="input", activation_bits=None)

    def __post_init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError:
            raise BadInput("--task digits: needs scikit-learn: pip install scikit-learn") from None
        if self.protocol.activations != "input" or self.protocol.group is not None:
            raise BadInput("--task digits: has --activations input and no --group")
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 8 - 1
        self._images, self._labels = images, torch.tensor(labels)[order]
        self._learned = len(labels) - 497

    def network(self, spec: asymq.QuantSpec | None = None) -> nn.Sequential:
        """Float, or with quantizers of the inputs of all layers but the first and the last."""

        def hidden(*layers: nn.Module) -> list[nn.Module]:
            return [*layers, nn.ReLU(), nn.Identity() if spec is None else asymq.QuantAct(spec)]

        return nn.Sequential(
            nn.Flatten(),
            *hidden(nn.Linear(64, 128)),
            *hidden(nn.Linear(128, 128)),
            *hidden(nn.Linear(128, 128))[:-1],
            nn.Linear(128, 10),
        )

    def make(self, seeds: Sequence[int]) -> None:
        for seed in seeds:
            if self._path(seed).exists():
                continue
            torch.manual_seed(seed)
            model = self.network()
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.float_steps)
            for step in range(self.float_steps):
                optimizer.zero_grad()
                self.loss(model, self.batch(step, seed + 10**6, torch.device("cpu"))).backward()
                optimizer.step()
                rates.step()
            write(self._path(seed), partial(torch.save, model.state_dict()))

    def _path(self, seed: int) -> Path:
        return self.folder / f"{self.label}__seed{seed}.pt"

    def quantized(self, bits: int, seed: int) -> nn.Module:
        config = self.protocol.config(bits)
        model = self.network(config.input)
        model.load_state_dict(torch.load(self._path(seed), weights_only=True), strict=False)
        layers = [name for name, module in model.named_modules() if hasattr(module, "weight")]
        ends = (f"{layers[0]}.weight_quantizer", f"{layers[-1]}.weight_quantizer")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the network has its other quantizers itself
            return asymq.prepare(model, asymq.QuantConfig(config.weight, skip=ends))

    def batch(self, step: int, seed: int, device: torch.device) -> tuple[Tensor, ...]:
        assert self.protocol.batch is not None
        rows = text.batch_of(torch.arange(self._learned), step, self.protocol.batch, seed)
        shift = ((step + seed) % 3 - 1, (step + seed) // 3 % 3 - 1)
        images = torch.roll(self._images[rows], shift, dims=(2, 3))
        return images.to(device), self._labels[rows].to(device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(model.train()(images), labels)

    @torch.no_grad()
    def score(self, model: nn.Module, device: torch.device) -> float:
        images, labels = self._images[self._learned :], self._labels[self._learned :]
        found = model.eval()(images.to(device)).argmax(1).cpu()
        return 100 * (found == labels).double().mean().item()


@dataclass
class ConvolvedDigits(Digits):
    """The same with a convolutional network."""

    label: str = "digits-conv"

    def network(self, spec: asymq.QuantSpec | None = None) -> nn.Sequential:
        def hidden(channels: int, out: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(channels, out, 3, padding=1, stride=stride, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
                nn.Identity() if spec is None else asymq.QuantAct(spec),
            ]

        layers = [*hidden(1, 16, 1), *hidden(16, 16, 1), *hidden(16, 32, 2), *hidden(32, 32, 2)]
        return nn.Sequential(*layers[:-1], nn.Flatten(), nn.Linear(128, 10))


# ---- language models ---------------------------------------------------------------------------


@dataclass
class Language(Task):
    """A causal language model and text. Dropout is off."""

    name: str  # as table2.py's --model
    train: Tensor  # windows [n, context]
    test: Tensor
    protocol: Protocol
    depends_on: dict
    label: str
    metric: str = "loss, nats a token"
    higher_is_better: bool = False

    DEFAULTS = Defaults(steps=2000, batch=8, activations="every", activation_bits=8)

    @classmethod
    def open(cls, name: str, protocol: Protocol, train: text.Text, test: text.Text) -> Language:
        from asymq.experiments.table2 import protocol as table2
        from asymq.experiments.table2.subject import open_subject

        assert protocol.batch is not None
        opened = open_subject(
            name, train, test, table2.Protocol(context=protocol.context, batch=protocol.batch), ()
        )
        kept = ("context", "train_text_sha256", "test_text_sha256", "model_sha256")
        return cls(
            name,
            opened.train,
            opened.test[: protocol.evaluate],
            protocol,
            {key: opened.settings[key] for key in kept},
            opened.label,
        )

    @property
    def settings(self) -> dict:
        return super().settings | self.depends_on

    def quantized(self, bits: int, seed: int) -> nn.Module:
        from asymq.experiments.table2.subject import Subject

        model = Subject(self.name, self.train, self.test, {}).load()
        model.config.use_cache = False  # type: ignore[union-attr]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return asymq.prepare(model, self.protocol.config(bits))
        except ValueError as error:
            raise BadInput(f"--task {self.name}: {first_line(error)}") from None

    def batch(self, step: int, seed: int, device: torch.device) -> tuple[Tensor, ...]:
        assert self.protocol.batch is not None
        return (text.batch_of(self.train, step, self.protocol.batch, seed).to(device),)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(input_ids=batch[0], labels=batch[0]).loss

    def score(self, model: nn.Module, device: torch.device) -> float:
        assert self.protocol.batch is not None
        return math.log(text.perplexity(model, self.test, self.protocol.batch))


# ---- which -------------------------------------------------------------------------------------


def open_task(name: str, protocol: Protocol, data: str | None, out: Path) -> Task:
    """The task of --task with its defaults in the protocol; what it makes goes into `out`/float.
    data: as table2.py's --data; None: Python's help topics.

    BadInput: there is no such task, or something that it needs.
    """
    folder = out / "float"
    if name in ("digits", "digits-conv"):
        if data is not None:
            raise BadInput(f"--data {data}: --task {name} has no text")
        cls = Digits if name == "digits" else ConvolvedDigits
        return cls(_filled(protocol, Digits.DEFAULTS), folder)
    from asymq.experiments.common import quickstart

    if data is None:
        train, test = (text.Text("Python's help topics", part) for part in quickstart.read_topics())
    else:
        train, test = text.read(data)
    defaults = Language.DEFAULTS
    if name == "text":
        if not (folder / quickstart.NAME).exists():
            quickstart.make(folder)
        name, defaults = str(folder / quickstart.NAME), replace(defaults, steps=400)
    return Language.open(name, _filled(protocol, defaults), train, test)


def _filled(protocol: Protocol, defaults: Defaults) -> Protocol:
    missing = {k: v for k, v in asdict(defaults).items() if getattr(protocol, k) is None}
    return replace(protocol, **missing)
