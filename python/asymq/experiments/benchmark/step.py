"""The cost of a training step with quantized ranges, in multiples of the fastest float model's.

A step is forward, loss, backward and Adam. The float models learn their weights, the quantized
ones their ranges alone, at every site of the paper's Table 2, by the usual loss or by
SelfDistillation, or weights and ranges (joint), or weights whose own ranges are frozen, also with a
TransitionRateScheduler. Weights are random: they do not change what a step costs.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import asymq
from asymq import reference
from asymq.experiments.benchmark import profile, recorded
from asymq.experiments.benchmark.timing import Timing, timing
from asymq.experiments.common.provenance import header
from asymq.quantizers.functions import use_namespace


@dataclass(frozen=True)
class Setting:
    """A model's shape and the batch it is given."""

    family: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    context: int


@dataclass(frozen=True)
class LlamaSetting(Setting):
    """With grouped queries."""

    kv_heads: int
    intermediate: int


MODELS: dict[str, Setting] = {
    "gpt2": Setting("gpt2", 12, 768, 12, 50257, batch=8, context=1024),
    # Where the GPU has next to nothing to do: the host's cost.
    "gpt2-tiny": Setting("gpt2", 12, 768, 12, 50257, batch=1, context=32),
    "gpt2-xl": Setting("gpt2", 48, 1600, 25, 50257, batch=8, context=768),
    "opt-1.3b": Setting("opt", 24, 2048, 32, 50272, batch=8, context=1024),
    # Llama 3.2 1B.
    "llama-1b": LlamaSetting(
        *("llama", 16, 2048, 32, 128256), batch=2, context=2048, kv_heads=8, intermediate=8192
    ),
    "quickstart": Setting("gpt2", 4, 128, 4, 2048, batch=8, context=128),
}
PRECISIONS = ("tf32", "float32", "bfloat16")
DEFAULT_PRECISIONS = {"cuda": ("tf32", "bfloat16"), "cpu": ("float32", "bfloat16")}
OUT_OF_MEMORY = "out of memory"


@dataclass
class StepTime:
    """Without a time, with OUT_OF_MEMORY as its peak, where a method had too little memory."""

    device: str
    precision: str
    method: str
    milliseconds: float | None
    ratio: float | None  # to the fastest float model of the run; None: it has none
    peak_gib: float | str | None  # of the GPU's memory
    spread: float | None  # of the quartiles, in multiples of the median


# ---- methods -----------------------------------------------------------------------------------


def float_model(setting: Setting, device: str, attention: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

    torch.manual_seed(0)
    # Dropout is no part of range learning, and would slow down the float model alone.
    if isinstance(setting, LlamaSetting):
        config = LlamaConfig(
            num_hidden_layers=setting.layers,
            hidden_size=setting.width,
            intermediate_size=setting.intermediate,
            num_attention_heads=setting.heads,
            num_key_value_heads=setting.kv_heads,
            max_position_embeddings=setting.context,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=True,
        )
    elif setting.family == "gpt2":
        config = GPT2Config(
            n_layer=setting.layers,
            n_embd=setting.width,
            n_head=setting.heads,
            n_positions=setting.context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    else:
        config = OPTConfig(
            num_hidden_layers=setting.layers,
            hidden_size=setting.width,
            word_embed_proj_dim=setting.width,
            num_attention_heads=setting.heads,
            ffn_dim=4 * setting.width,
            max_position_embeddings=setting.context,
            dropout=0.0,
        )
    config.vocab_size, config.use_cache = setting.vocabulary, False
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    config.loss_type = "ForCausalLM"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.train()


def prepared_model(method: Method, setting: Setting, device: str, ids) -> nn.Module:
    model = float_model(setting, device, "eager")
    asymq.prepare(model, asymq.QuantConfig.table2(method.parameterization))
    asymq.calibrate(model, [ids[:1]])
    if method.learns == RANGES:
        asymq.freeze_weights(model)
    elif method.learns == WEIGHTS:
        asymq.freeze_weight_ranges(model)
    return model


def _torch_core_asymmetric(x, scale, offset, *, bits, eps):
    return torch._fake_quantize_learnable_per_tensor_affine(x, scale, -offset, 0, 2**bits - 1, 1.0)


def _torch_core_symmetric(x, scale, *, bits, eps):
    axis, p = max(range(x.dim()), key=lambda i: scale.shape[i]), 2 ** (bits - 1) - 1
    zero_point = torch.zeros(scale.numel(), device=x.device)
    return torch._fake_quantize_learnable_per_channel_affine(
        x, scale.flatten(), zero_point, axis, -p, p, 1.0
    )


# torch's learnable operators, which know a scale and a zero point alone.
TORCH_CORE = SimpleNamespace(
    fake_quantize_scale_offset=_torch_core_asymmetric,
    fake_quantize_symmetric_scale=_torch_core_symmetric,
)


# What a method learns: RANGES alone, WEIGHTS without their ranges, or all.
RANGES, WEIGHTS, JOINT = "ranges", "weights", "joint"


@dataclass(frozen=True)
class Method:
    functions: object | None  # of the quantizers; None: the float model
    parameterization: str = "min_max"
    attention: str = "eager"
    compiled: bool = False
    captured: bool = False
    learns: str = RANGES
    scheduled: bool = False  # by the share of their codes that change
    distilled: bool = False  # the loss is against the model without quantizers


METHODS = {
    "float_eager": Method(None),
    "float_sdpa": Method(None, attention="sdpa"),
    "float_sdpa_compiled": Method(None, attention="sdpa", compiled=True),
    "asymq": Method(asymq.ops),
    "asymq_captured": Method(asymq.ops, captured=True),
    "asymq_compiled": Method(asymq.ops, compiled=True),
    "asymq_distilled": Method(asymq.ops, distilled=True),
    "asymq_joint": Method(asymq.ops, learns=JOINT),
    "asymq_joint_captured": Method(asymq.ops, learns=JOINT, captured=True),
    "asymq_joint_compiled": Method(asymq.ops, learns=JOINT, compiled=True),
    "asymq_weights": Method(asymq.ops, learns=WEIGHTS),
    "asymq_scheduled": Method(asymq.ops, learns=WEIGHTS, scheduled=True),
    "torch_core": Method(TORCH_CORE, "scale_offset"),
    "reference": Method(reference),
    "compiled": Method(reference, compiled=True),
}


@contextmanager
def step_of(
    method: Method, setting: Setting, device: str, precision: str, checkpointing: bool
) -> Iterator[tuple[Callable, nn.Module]]:
    """One training step as a function of nothing, and its model."""
    torch.manual_seed(1)
    ids = torch.randint(setting.vocabulary, (setting.batch, setting.context), device=device)
    if method.functions is None:
        model: Any = float_model(setting, device, method.attention)
        parameters: Iterable[Any] = model.parameters()
    else:
        model = prepared_model(method, setting, device, ids)
        learned = [p for p in model.parameters() if p.requires_grad]
        parameters = asymq.range_parameters(model) if method.learns == RANGES else learned
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.Adam(parameters, lr=1e-5, capturable=method.captured, fused=True)
    rates = None
    if method.scheduled:
        rates = asymq.TransitionRateScheduler(optimizer, model, 10_000)
    if method.compiled:
        torch.compiler.reset()
        model = torch.compile(model)
    loss_of: Any = lambda **batch: model(**batch).loss  # noqa: E731
    if method.distilled:
        loss_of = asymq.SelfDistillation(model)
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")

    def step():
        optimizer.zero_grad()
        with autocast:
            loss = loss_of(input_ids=ids, labels=ids)
        loss.backward()
        optimizer.step()
        if rates is not None:
            rates.step()

    quantized = method.functions is not None
    with use_namespace(method.functions) if quantized else nullcontext():
        yield asymq.capture_step(step) if method.captured else step, model


CAPTURED = [name for name, method in METHODS.items() if method.captured]  # which need a GPU


# ---- the run -----------------------------------------------------------------------------------


def use_precision(name: str) -> None:
    """Of float32's matrix products."""
    torch.set_float32_matmul_precision("highest" if name == "float32" else "high")


def release(device: str) -> None:
    """Of models that nothing refers to any more, the memory, before the next one needs it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(step: Callable, device: str, span: float) -> tuple[Timing, float | None]:
    """Of a step, and the peak of the GPU's memory in GiB."""

    def sample():
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        sample()
    if device != "cuda":
        return timing(sample, span), None
    torch.cuda.reset_peak_memory_stats()
    return timing(sample, span), torch.cuda.max_memory_allocated() / 2**30


def markdown(rows: list[StepTime], head: list[str]) -> str:
    lines = ["# A training step", "", *(f"- {line}" for line in head), ""]
    lines += [
        "| precision | method | learns | ms | times the fastest float | spread | peak GiB |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        method = METHODS[row.method]
        learns = WEIGHTS if method.functions is None else method.learns
        cells = [row.precision, row.method, learns, figure(row.milliseconds, ".1f")]
        cells += [figure(row.ratio, ".2f"), figure(row.spread, ".1%"), figure(row.peak_gib, ".1f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(value: float | str | None, form: str) -> str:
    """Empty for None; words stay."""
    return "" if value is None else value if isinstance(value, str) else format(value, form)


def run(args) -> None:
    """Saves after every method: what is measured outlives a failure or an interruption."""
    torch.set_num_threads(args.threads)
    name = args.model or ("gpt2" if args.device == "cuda" else "quickstart")
    setting, suffix = f"{name}: {MODELS[name]}", f"_{args.model}" if args.model else ""
    if args.checkpointing:
        setting += ", gradient checkpointing"
        suffix += "_checkpointing" if args.model else ""
    against = recorded.read(args, StepTime, [setting])
    head = header(args.device, "random weights, 4-bit weights, 12-bit activations")
    head.append(setting)
    print("\n".join(head))
    path = args.out / f"step_{args.device}{suffix}"
    rows: list[StepTime] = []
    profiles: list[str] = []
    for precision in args.precision:
        use_precision(precision)
        for method in args.only:
            row, lines = _measured(method, precision, MODELS[name], args)
            release(args.device)
            rows = _with_ratios([*rows, row])
            profiles += lines
            report = "\n".join([markdown(rows, head), *profiles])
            recorded.save(path, head, rows, report, against)
    print(markdown(rows, head))
    recorded.tell(path, rows, against)


def _with_ratios(rows: list[StepTime]) -> list[StepTime]:
    """Of each precision to the fastest float model that was measured in it."""
    base: dict[str, float] = {}
    for row in rows:
        if METHODS[row.method].functions is None and row.milliseconds is not None:
            base[row.precision] = min(row.milliseconds, base.get(row.precision, math.inf))

    def ratio(row: StepTime) -> float | None:
        if row.milliseconds is None or row.precision not in base:
            return None
        return round(row.milliseconds / base[row.precision], 3)

    return [replace(row, ratio=ratio(row)) for row in rows]


def _measured(method: str, precision: str, setting: Setting, args) -> tuple[StepTime, list[str]]:
    """A row of the results, which it prints, without its ratio, and with args.profile where the
    time goes."""
    profiled: list[str] = []
    found: Timing | None = None
    peak: float | str | None = OUT_OF_MEMORY
    with (
        suppress(torch.OutOfMemoryError),
        step_of(METHODS[method], setting, args.device, precision, args.checkpointing) as made,
    ):
        found, peak = measure(made[0], args.device, 1.0 if args.quick else 3.0)
        if args.profile:
            profiled = profile.markdown(
                profile.profile(*made, found.seconds), f"{method}, {precision}"
            )
    row = StepTime(
        device=args.device,
        precision=precision,
        method=method,
        milliseconds=round(found.seconds * 1e3, 3) if found else None,
        ratio=None,
        peak_gib=round(peak, 2) if isinstance(peak, float) else peak,
        spread=round(found.spread, 4) if found else None,
    )
    memory = "" if peak is None else f"  {figure(row.peak_gib, '6.1f')} GiB"
    said = OUT_OF_MEMORY if found is None else f"{row.milliseconds:8.1f} ms{memory}"
    print(f"{precision:8} {method:20} {said}", flush=True)
    return row, profiled
