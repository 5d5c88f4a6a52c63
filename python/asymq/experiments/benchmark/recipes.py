"""The cost of training and of generating with a deployment recipe, in multiples of the float
model's.

A step is forward, loss, backward and AdamW, on the weights and, where there are quantizers, on
their ranges. Weights are random: they do not change what a step costs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import asymq
from asymq.experiments.benchmark import profile, recorded
from asymq.experiments.benchmark.step import MODELS, Setting, float_model, measure
from asymq.experiments.common.files import BadInput, first_line
from asymq.experiments.common.provenance import header
from asymq.experiments.common.recipes import Recipe

# Of the float model; the quantized ones are eager and have its attention.
FLOAT, COMPILED = "float_sdpa", "float_compiled"
RECIPES = "recipes"
METHODS = (FLOAT, COMPILED, RECIPES)
# Of weights and activations.
DTYPES = {"tf32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_PRECISIONS = ("bfloat16",)
STEP, GENERATE = "step", "generate"
PROMPT, NEW = 128, 128  # tokens of a generation, at most half of the setting's context each


@dataclass
class Row:
    device: str
    precision: str
    what: str  # STEP or GENERATE
    method: str  # of the float model, or a recipe
    milliseconds: float  # of a step, or of a whole generation
    tokens_per_second: float
    times_float_sdpa: float | None
    times_float_compiled: float | None
    peak_gib: float | None  # of the GPU's memory


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
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
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
    for precision in args.precision:
        for what in (STEP, GENERATE) if args.generate else (STEP,):
            base: dict[str, float] = {}
            for method in methods:
                # Compiled, every length of the cache would be a program of its own.
                if what == STEP or method != COMPILED:
                    row, lines = _measured(method, what, precision, MODELS[name], args, base)
                    rows.append(row)
                    profiles += lines
    suffix = f"_{args.model}" if args.model else ""
    path = args.out / f"recipes_{args.device}{suffix}"
    recorded.save(path, head, rows, "\n".join([markdown(rows, head), *profiles]), against)


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
    model = model_of(method, setting, args, DTYPES[precision])
    ids = tokens(setting, args.device)
    count = ids.numel()
    if what == STEP:
        work = training_step(model, ids, compiled=method == COMPILED)
    else:
        prompt = ids[:1, : min(PROMPT, setting.context // 2)]
        count = min(NEW, setting.context - prompt.shape[1])
        work = generation(model, prompt, count)
    timing, peak = measure(work, args.device, 1.0 if args.quick else 3.0)
    seconds = timing.seconds
    profiled: list[str] = []
    if args.profile:
        found = profile.profile(work, model, seconds)
        profiled = profile.markdown(found, f"{what}, {method}, {precision}")
    milliseconds = round(seconds * 1e3, 3)
    if isinstance(method, str):
        base[method] = milliseconds
    row = Row(
        device=args.device,
        precision=precision,
        what=what,
        method=str(method),
        milliseconds=milliseconds,
        tokens_per_second=round(count / seconds, 1),
        times_float_sdpa=round(milliseconds / base[FLOAT], 3) if FLOAT in base else None,
        times_float_compiled=round(milliseconds / base[COMPILED], 3) if COMPILED in base else None,
        peak_gib=peak and round(peak, 2),
    )
    print(" ".join(f"{part:>10}" for part in _shown(row)), flush=True)
    del model, work
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return row, profiled


def _shown(row: Row) -> list[str]:
    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        *(row.precision, row.what, row.method, f"{row.milliseconds:.1f}"),
        *(f"{row.tokens_per_second:.0f}", figure(row.times_float_sdpa, ".2f")),
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
