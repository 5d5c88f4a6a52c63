"""The cost of training and of generating with a deployment recipe, in multiples of the float
model's.

A step is forward, loss, backward and AdamW, on the weights and, where there are quantizers, on
their ranges. Weights are random: they do not change what a step costs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import asymq
from asymq.experiments.benchmark import profile, recorded
from asymq.experiments.benchmark.step import (
    MODELS,
    OUT_OF_MEMORY,
    Setting,
    figure,
    float_model,
    measure,
    release,
    use_precision,
)
from asymq.experiments.benchmark.timing import Timing
from asymq.experiments.common.files import BadInput, first_line
from asymq.experiments.common.provenance import header
from asymq.experiments.common.recipes import Recipe

# Of the float model; the quantized ones are eager and have its attention.
FLOAT, COMPILED = "float_sdpa", "float_compiled"
RECIPES = "recipes"
METHODS = (FLOAT, COMPILED, RECIPES)
# Of weights and activations.
DTYPES = {"tf32": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_PRECISIONS = dict.fromkeys(("cuda", "cpu"), ("bfloat16",))
STEP, GENERATE = "step", "generate"
PROMPT, NEW = 128, 128  # tokens of a generation, at most half of the setting's context each


@dataclass
class Row:
    """Without a time, with OUT_OF_MEMORY as its peak, where there was too little memory."""

    device: str
    precision: str
    what: str  # STEP or GENERATE
    method: str  # of the float model, or a recipe
    milliseconds: float | None  # of a step, or of a whole generation
    tokens_per_second: float | None
    times_float_sdpa: float | None
    times_float_compiled: float | None
    peak_gib: float | str | None  # of the GPU's memory


def model_of(method: str | Recipe, setting: Setting, args, dtype: torch.dtype) -> nn.Module:
    """Built at once in its dtype: in another one it might not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = float_model(setting, args.device, "sdpa")
    finally:
        torch.set_default_dtype(before)
    if isinstance(method, Recipe):
        asymq.prepare(model, method.config())
        asymq.calibrate(model, [tokens(setting, args.device)[:1]])
    if args.checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


def tokens(setting: Setting, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    shape = setting.batch, setting.context
    return torch.randint(setting.vocabulary, shape, device=device, generator=generator)


def training_step(model: nn.Module, ids: Tensor, compiled: bool) -> Callable[[], None]:
    ranges = asymq.range_parameters(model) if [*asymq.named_quantizers(model)] else []
    parameters = [{"params": asymq.weight_parameters(model)}, *ranges]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    forward: Any = model
    if compiled:
        torch.compiler.reset()
        forward = torch.compile(model)

    def step():
        optimizer.zero_grad()
        forward(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return step


def generation(model: nn.Module, ids: Tensor, count: int) -> Callable[[], None]:
    """Greedy, of one sequence, with a cache, always `count` tokens."""
    generate: Any = model.eval().generate
    options = {"max_new_tokens": count, "min_new_tokens": count, "use_cache": True}

    def run():
        generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)

    return run


# ---- the run -----------------------------------------------------------------------------------


def run(args) -> None:
    """Saves after every row: what is measured outlives a failure or an interruption."""
    torch.set_num_threads(args.threads)
    name = args.model or ("llama-1b" if args.device == "cuda" else "quickstart")
    setting = f"{name}: {MODELS[name]}"
    if args.checkpointing:
        setting += ", gradient checkpointing"
    against = recorded.read(args, Row, [setting])
    _need_preparable(MODELS[name], args.recipe)
    head = header(args.device, "random weights, AdamW (fused) on weights and ranges")
    head.append(setting)
    print("\n".join(head))
    methods: list[str | Recipe] = [m for m in (FLOAT, COMPILED) if m in args.only]
    methods += args.recipe if RECIPES in args.only else []
    rows: list[Row] = []
    profiles: list[str] = []
    suffix = f"_{args.model}" if args.model else ""
    path = args.out / f"recipes_{args.device}{suffix}"
    for precision in args.precision:
        use_precision(precision)
        for what in (STEP, GENERATE) if args.generate else (STEP,):
            base: dict[str, float] = {}
            for method in methods:
                # Compiled, every length of the cache would be a program of its own.
                if what == STEP or method != COMPILED:
                    row, lines = _measured(method, what, precision, MODELS[name], args, base)
                    release(args.device)
                    rows.append(row)
                    profiles += lines
                    report = "\n".join([markdown(rows, head), *profiles])
                    recorded.save(path, head, rows, report, against)
    recorded.tell(path, rows, against)


def _need_preparable(setting: Setting, chosen: list[Recipe]) -> None:
    """BadInput, before anything is measured: a recipe does not fit the model."""
    for recipe in chosen:
        try:
            asymq.prepare(float_model(setting, "meta", "sdpa"), recipe.config())
        except ValueError as error:
            raise BadInput(f"--recipe {recipe}: {first_line(error)}") from None


def _measured(
    method: str | Recipe, what: str, precision: str, setting: Setting, args, base: dict[str, float]
) -> tuple[Row, list[str]]:
    """A row of the results, which it prints, and with args.profile where the time goes. base:
    milliseconds of the float model's methods, as far as they are measured."""
    profiled: list[str] = []
    found: Timing | None = None
    peak: float | str | None = OUT_OF_MEMORY
    ids = tokens(setting, args.device)
    count, prompt = ids.numel(), ids[:1, : min(PROMPT, setting.context // 2)]
    if what == GENERATE:
        count = min(NEW, setting.context - prompt.shape[1])
    with suppress(torch.OutOfMemoryError):
        model = model_of(method, setting, args, DTYPES[precision])
        if what == STEP:
            work = training_step(model, ids, compiled=method == COMPILED)
        else:
            work = generation(model, prompt, count)
        found, peak = measure(work, args.device, 1.0 if args.quick else 3.0)
        if args.profile:
            parts = profile.profile(work, model, found.seconds)
            profiled = profile.markdown(parts, f"{what}, {method}, {precision}")
    milliseconds = round(found.seconds * 1e3, 3) if found else None
    if isinstance(method, str) and milliseconds is not None:
        base[method] = milliseconds

    def times(of: str) -> float | None:
        return round(milliseconds / base[of], 3) if milliseconds and of in base else None

    row = Row(
        device=args.device,
        precision=precision,
        what=what,
        method=str(method),
        milliseconds=milliseconds,
        tokens_per_second=round(count / found.seconds, 1) if found else None,
        times_float_sdpa=times(FLOAT),
        times_float_compiled=times(COMPILED),
        peak_gib=round(peak, 2) if isinstance(peak, float) else peak,
    )
    print(" ".join(f"{part:>10}" for part in _shown(row)), flush=True)
    return row, profiled


def _shown(row: Row) -> list[str]:
    return [
        *(row.precision, row.what, row.method, figure(row.milliseconds, ".1f")),
        *(figure(row.tokens_per_second, ".0f"), figure(row.times_float_sdpa, ".2f")),
        *(figure(row.times_float_compiled, ".2f"), figure(row.peak_gib, ".1f")),
    ]


def markdown(rows: list[Row], head: list[str]) -> str:
    lines = ["# Recipes: a training step, and generating", "", *(f"- {line}" for line in head), ""]
    lines += [
        "| precision | what | method | ms | tokens/s | times float_sdpa | times float_compiled "
        "| peak GiB |",
        "|" + "---|" * 8,
    ]
    return "\n".join([*lines, *(f"| {' | '.join(_shown(row))} |" for row in rows)]) + "\n"
