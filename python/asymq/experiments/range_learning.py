"""One cell of Table 2: a model, its quantizers, and ranges that learn while the weights do not.

The weights are frozen and dropout is off, so that a step depends on the ranges and its batch alone.
"""

from __future__ import annotations

import gc
import json
import math
import pickle
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import asymq
from asymq.experiments import text
from asymq.experiments.files import BadInput, sha256, write
from asymq.experiments.measuring import provenance
from asymq.experiments.processes import Processes
from asymq.quantizer import Quantizer

DIVERGED, DIVERGED_ABOVE = "diverged", 1e6
TRAJECTORIES, TRAJECTORY_POINTS = 6, 200


@dataclass(frozen=True)
class Protocol:
    """How every cell is run; the defaults are the paper's, or fill in what it leaves open."""

    steps: int = 2000
    batch: int = 8
    context: int | None = None  # None: 1024, 768 for GPT2-XL, at most the model's
    seed: int = 0
    calibration_batches: int = 10
    weight_bits: int = 4
    activation_bits: int = 12
    norm_bits: int = 12
    weight_granularity: str = "channel"  # or "tensor", or the size of groups
    activation_granularity: str = "tensor"
    force_zero: bool = True  # into every range that calibration finds
    eps: float = 1e-8  # the least scale
    adam_eps: float = 1e-8
    tf32: bool = True  # while learning; calibration and evaluation are float32
    perplexity: str = "raw"  # or "run_clm"
    eval_every: int = 500
    checkpoint_every: int = 100

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1 or self.calibration_batches < 1 or self.eval_every < 1:
            raise BadInput("steps, batch, calibration batches and eval-every must be at least 1")
        if not 1 <= self.checkpoint_every <= 100:
            raise BadInput(f"--checkpoint-every must be 1 to 100, got {self.checkpoint_every}")
        if not 0 < self.adam_eps < math.inf:
            raise BadInput(f"--adam-eps must be positive, got {self.adam_eps}")
        try:
            self.config("min_max")
        except ValueError as error:
            raise BadInput(str(error)) from None

    def config(self, parameterization: str) -> asymq.QuantConfig:
        table2 = asymq.QuantConfig.table2(parameterization)
        weights, activations = (
            _granularity(name) for name in (self.weight_granularity, self.activation_granularity)
        )
        return replace(
            table2,
            weight=replace(table2.weight, bits=self.weight_bits, eps=self.eps, granularity=weights),
            activation=replace(
                table2.activation, bits=self.activation_bits, eps=self.eps, granularity=activations
            ),
            norm_weight=replace(table2.norm_weight, bits=self.norm_bits, eps=self.eps),
        )


def _granularity(name: str):
    if name in ("tensor", "channel"):
        return asymq.PerTensor() if name == "tensor" else asymq.PerChannel()
    if not name.isdigit():
        raise ValueError(f"a granularity is tensor, channel or the size of groups, got {name!r}")
    return asymq.PerGroup(int(name))


@dataclass(frozen=True)
class Cell:
    """model: its label. lr: as typed."""

    model: str
    parameterization: str
    lr: str

    @property
    def name(self) -> str:
        return f"{self.model}__{self.parameterization}__{self.lr}"

    def __str__(self) -> str:
        return f"{self.model} {self.parameterization} {self.lr}"


# ---- a model and its text ----------------------------------------------------------------------


@dataclass
class Subject:
    """A model with the text it learns from and is evaluated on, as windows [n, context]."""

    name: str  # what transformers loads
    train: Tensor
    test: Tensor
    settings: dict  # what the results depend on: the protocol, the texts, the model's files
    float_perplexity: float | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return label_of(self.name)

    def load(self) -> nn.Module:
        """The float model in float32, dropout off."""
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(self.name, dtype=torch.float32)
        except Exception as error:
            raise BadInput(f"{self.name}: its weights do not load: {_line(error)}") from None
        return model.eval()


def label_of(name: str) -> str:
    """How results call a model: the last part of its name or folder."""
    return Path(name).resolve().name if Path(name).is_dir() else name.rsplit("/", 1)[-1]


def open_subject(name: str, train: text.Text, test: text.Text, protocol: Protocol) -> Subject:
    """Reads everything of a model but its weights, and tokenizes the texts.

    BadInput: no such model, not a family that asymq quantizes at every site, a context longer than
    the model's, a text shorter than a window.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(name)
    files = _files(folder) if folder.is_dir() else []
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise BadInput(
            f"{name}: no such folder; give one with config, weights and tokenizer, or a name of "
            "the hub"
        )
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        raise BadInput(f"{name}: no model's folder or name of the hub: {_line(error)}") from None
    family = config.model_type
    if family == "generic" or not find_spec(f"asymq.models.{family}"):
        raise BadInput(f"{name}: is a {family!r} model; Table 2 is about GPT-2 and OPT")
    _need_preparable(name, config, protocol)
    longest = config.max_position_embeddings
    context = protocol.context or min(longest, _default_context(config))
    if not 2 <= context <= longest:
        raise BadInput(f"{name}: --context must be 2 to {longest}, the model's, got {context}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise BadInput(f"{name}: its tokenizer does not load: {_line(error)}") from None
    ids = {
        "train": text.tokenize(tokenizer, train.content),
        "test": text.tokenize(tokenizer, test.content, protocol.perplexity == "run_clm"),
    }
    for tokens in ids.values():
        if len(tokens) and int(tokens.max()) >= config.vocab_size:
            raise BadInput(
                f"{name}: its tokenizer has more tokens than the model ({config.vocab_size}); they "
                "do not belong together"
            )
    settings = {
        **asdict(protocol),
        "context": context,
        "train_text": train.source,
        "train_text_sha256": train.sha256,
        "test_text": test.source,
        "test_text_sha256": test.sha256,
        "model_sha256": {file.name: sha256(file) for file in files},
    }
    return Subject(
        name,
        text.windows(ids["train"], context, train.source),
        text.windows(ids["test"], context, test.source),
        settings,
    )


def _files(folder: Path) -> list[Path]:
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not (folder / "config.json").exists() or not weights:
        raise BadInput(
            f"{folder}: needs config.json and model.safetensors; give a folder that "
            "save_pretrained has written"
        )
    return [folder / "config.json", *weights]


def _need_preparable(name: str, config, protocol: Protocol) -> None:
    """Prepares the model without its weights."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        asymq.prepare(model, protocol.config("min_max"))
    except ValueError as error:
        raise BadInput(f"{name}: {_line(error)}") from None


def _default_context(config) -> int:
    xl = config.model_type == "gpt2" and config.hidden_size == 1600
    return 768 if xl else 1024


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- running a cell ----------------------------------------------------------------------------


@dataclass
class State:
    """A cell's progress: what a checkpoint holds beside ranges and optimizer."""

    fp_ppl: float
    step: int = 0  # steps taken
    ppl: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    trajectories: dict[str, list] = field(default_factory=dict)  # name: [step, low, high]
    seconds: float = 0.0  # of training
    peak_gib: float | None = None


def checkpoint_path(out: Path, cell: Cell) -> Path:
    return out / "checkpoints" / f"{cell.name}.pt"


def ranges_path(out: Path, cell: Cell) -> Path:
    """The learned ranges, by the names that the prepared model's state_dict has for them."""
    return out / "ranges" / f"{cell.name}.safetensors"


def result_path(out: Path, cell: Cell) -> Path:
    return out / f"{cell.name}.json"


def run_cell(
    cell: Cell,
    subject: Subject,
    protocol: Protocol,
    out: Path,
    processes: Processes,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Runs what is left of a cell and writes its result. `show` is told of every step's loss."""
    saved = read_checkpoint(out, cell) if processes.first else None
    saved = processes.share(saved)
    if saved:
        state = State(**saved["state"])
    else:
        state = State(fp_ppl=_float_perplexity(subject, protocol, processes))

    gc.collect()  # models of earlier cells, which hold themselves in cycles
    model = asymq.prepare(subject.load(), protocol.config(cell.parameterization))
    model.config.use_cache = False
    asymq.freeze_weights(model)
    processes.place(model)
    quantizers = dict(asymq.named_quantizers(model))
    optimizer = torch.optim.Adam(
        asymq.range_parameters(model), lr=float(cell.lr), eps=protocol.adam_eps
    )
    if saved:
        for name, quantizer in quantizers.items():
            quantizer.load_state_dict(saved["ranges"][name])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        first = range(protocol.calibration_batches)
        asymq.calibrate(
            model, (_batch(subject, protocol, step) for step in first), protocol.force_zero
        )
        state.ppl["0"] = text.perplexity(model, subject.test, protocol.batch)
    followed = {name: quantizers[name] for name in _followed(quantizers)}
    interval = max(1, protocol.steps // TRAJECTORY_POINTS)
    forward = processes.replicate(model)
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def save():
        body = {
            "settings": subject.settings,
            "state": asdict(state),
            "ranges": {name: quantizer.state_dict() for name, quantizer in quantizers.items()},
            "optimizer": optimizer.state_dict(),
        }
        if processes.first:
            write(checkpoint_path(out, cell), lambda path: torch.save(body, path))

    while state.step < protocol.steps:
        if state.step % interval == 0:
            _follow(state, followed)
        start = time.perf_counter()
        optimizer.zero_grad()
        with _tf32(protocol.tf32 and processes.device.type == "cuda"):
            loss = backward(forward, model, _batch(subject, protocol, state.step), processes)
        optimizer.step()
        state.losses.append(loss)
        state.step += 1
        state.seconds += time.perf_counter() - start
        show(state.step, loss)
        if not math.isfinite(loss):
            break
        if state.step % protocol.eval_every == 0 and state.step < protocol.steps:
            state.ppl[str(state.step)] = text.perplexity(model, subject.test, protocol.batch)
        if state.step % protocol.checkpoint_every == 0 and state.step < protocol.steps:
            save()
    _follow(state, followed)
    state.ppl[str(state.step)] = text.perplexity(model, subject.test, protocol.batch)
    if processes.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        state.peak_gib = round(max(peak, state.peak_gib or 0), 2)
    if processes.first:
        result = _result(cell, subject, state, quantizers, processes)
        ranges = {
            f"{name}.{key}": tensor.detach().cpu().clone()
            for name, quantizer in quantizers.items()
            for key, tensor in quantizer.range_tensors().items()
        }
        write(ranges_path(out, cell), lambda path: save_file(ranges, path))
        write(result_path(out, cell), json.dumps(result))
        checkpoint_path(out, cell).unlink(missing_ok=True)


def backward(forward: nn.Module, model: nn.Module, batch: Tensor, processes: Processes) -> float:
    """The loss of a batch, shared by the processes; the ranges get the gradients of its mean."""
    ids = processes.rows(batch)
    loss = forward(input_ids=ids, labels=ids).loss
    loss.backward()
    processes.average_gradients([p for p in model.parameters() if p.grad is not None])
    return processes.mean(loss.detach()).item()


def _batch(subject: Subject, protocol: Protocol, step: int) -> Tensor:
    return text.batch_of(subject.train, step, protocol.batch, protocol.seed)


def _float_perplexity(subject: Subject, protocol: Protocol, processes: Processes) -> float:
    subject.float_perplexity = processes.share(subject.float_perplexity)
    if subject.float_perplexity is None:
        model = processes.place(subject.load())
        subject.float_perplexity = text.perplexity(model, subject.test, protocol.batch)
    return subject.float_perplexity


@contextmanager
def _tf32(on: bool):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _followed(quantizers: dict[str, Quantizer]) -> list[str]:
    """A few activations, from the first to the last."""
    names = [name for name, quantizer in quantizers.items() if quantizer.kind == "activation"]
    last = len(names) - 1
    return list(dict.fromkeys(names[i * last // (TRAJECTORIES - 1)] for i in range(TRAJECTORIES)))


def _follow(state: State, followed: dict[str, Quantizer]) -> None:
    for name, quantizer in followed.items():
        low, high = quantizer.bounds()
        point = [state.step, low.min().item(), high.max().item()]
        state.trajectories.setdefault(name, []).append(point)


# ---- files of a cell ---------------------------------------------------------------------------


def read_checkpoint(out: Path, cell: Cell) -> dict | None:
    """What an unfinished cell left; None if there is nothing. BadInput: it is damaged."""
    path = checkpoint_path(out, cell)
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError):
        raise BadInput(
            f"{path}: this checkpoint is incomplete; delete it and the cell starts again"
        ) from None


def read_result(path: Path) -> dict:
    """BadInput: it is damaged."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = {"model", "parameterization", "lr", "fp_ppl", "final_ppl", "settings"} - {*result}
        if missing:
            raise ValueError(missing)
        return {**result, "cell": Cell(*path.stem.rsplit("__", 2))}
    except (OSError, ValueError, TypeError):
        raise BadInput(f"{path}: is not a result; delete it and the cell is run again") from None


def need_same_settings(path: Path, found: dict, subject: Subject) -> None:
    """BadInput: the file `path` is of other settings than the subject's."""
    when = ("eval_every", "checkpoint_every")  # change no result
    for key, value in subject.settings.items():
        if key not in when and found.get(key) != value:
            raise BadInput(
                f"{path}: was made with {key} {found.get(key)}, not {value}; choose another --out, "
                "or delete it"
            )


def _result(
    cell: Cell,
    subject: Subject,
    state: State,
    quantizers: dict[str, Quantizer],
    processes: Processes,
) -> dict:
    collapsed = {n: int(q.collapsed().sum()) for n, q in quantizers.items()}
    return {
        "model": cell.model,
        "parameterization": cell.parameterization,
        "lr": float(cell.lr),
        "steps": subject.settings["steps"],
        "seed": subject.settings["seed"],
        "fp_ppl": _of_perplexity(state.fp_ppl),
        "calibrated_ppl": _of_perplexity(state.ppl["0"]),
        "ppl": {step: _of_perplexity(value) for step, value in state.ppl.items()},
        "final_ppl": _of_perplexity(state.ppl[str(state.step)]),
        "collapsed": {name: count for name, count in collapsed.items() if count},
        "ranges": sum(q.range_shape.numel() for q in quantizers.values()),
        "seconds_per_step": state.seconds / state.step,
        "peak_gib": state.peak_gib,
        **provenance(processes.device),
        "settings": subject.settings,
        "loss": [_finite(value) for value in state.losses],
        "trajectories": {
            name: [[_finite(value) for value in point] for point in points]
            for name, points in state.trajectories.items()
        },
    }


def _of_perplexity(value: float) -> float | str:
    return value if value <= DIVERGED_ABOVE else DIVERGED  # NaN is not <= anything


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
