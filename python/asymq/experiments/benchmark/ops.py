"""The cost of one fake-quantize with learned ranges, in multiples of copying the tensor once.

On a GPU, tensors of 100,000 elements and more are timed inside CUDA graphs where the method can be
captured, so that launches cost nothing: up to 32 MiB repeatedly on one buffer (warm L2), above
that over rotating buffers that together exceed the L2 cache many times. Smaller tensors are timed
as users run them, from eager Python. Every figure is a median over a fixed span of time.
"""

import gc
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

import asymq
from asymq import reference
from asymq.experiments.benchmark import recorded
from asymq.experiments.benchmark.timing import median_seconds
from asymq.experiments.common.files import first_line
from asymq.experiments.common.provenance import header

BITS = 8
GROUP = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The tokens' have the live ranges of the rows or of their groups, on one β and one γ for all; the
# last two what an RMSNorm, or a gated linear unit, gives to them.
GRANULARITIES = (
    "tensor",
    "axis0",
    "last_axis",
    "groups",
    "token",
    "token_groups",
    "token_rms_norm",
    "token_glu",
)
# frozen_x: x needs no gradient, dx is neither computed nor written. frozen_range: the range learns
# nothing.
MEASURES = (
    "forward",
    "backward",
    "both",
    "backward_frozen_x",
    "both_frozen_x",
    "both_frozen_range",
)

GRAPH_LEAST = 100_000  # elements
WARM_MOST = 32 << 20  # bytes
ROTATION = 512 << 20  # bytes; about ten times an H200's L2


@dataclass(frozen=True)
class Case:
    granularity: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @property
    def elements(self):
        return math.prod(self.shape)

    @property
    def bytes(self):
        return self.elements * self.dtype.itemsize

    @property
    def range_shape(self):
        rows, columns = self.shape if len(self.shape) == 2 else (1, 1)
        return {
            "tensor": (1,),
            "axis0": (rows, 1),
            "last_axis": (1, columns),
            "groups": (rows, columns // GROUP),
        }.get(self.granularity, (1,))

    @property
    def live(self):
        return self.granularity.startswith("token")

    def inputs(self):
        """Tensors that it is called with: x, and what it computes with before it quantizes."""
        shapes = [self.shape]
        if self.granularity == "token_rms_norm":
            shapes.append(self.shape[-1:])
        if self.granularity == "token_glu":
            shapes.append(self.shape)
        made = [torch.randn(shape, device=self.device).to(self.dtype) for shape in shapes]
        return tuple(tensor.requires_grad_() for tensor in made)

    def before(self, x, *others):
        """What is quantized, of single operations."""
        if self.granularity == "token_rms_norm":
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return others[0] * wide.to(x.dtype)
        return torch.nn.functional.silu(x) * others[0] if others else x

    @property
    def options(self):
        """Of the quantizer's function."""
        return {"bits": BITS} | ({"group": GROUP} if self.granularity == "token_groups" else {})


@dataclass
class OpTime:
    device: str
    dtype: str
    granularity: str
    shape: str
    method: str
    measure: str
    mode: str  # eager, or in a CUDA graph with a warm or cold L2 cache
    milliseconds: float
    copies: float  # time in multiples of one copy


# ---- methods ----------------------------------------------------------------------------------


def round_straight_through(x):
    return x + (x.round() - x).detach()


def straight_through(x, low, high, *, bits):
    """The usual composition under autograd, as quantization-aware training code writes it."""
    shape, dtype, k = x.shape, x.dtype, 2**bits - 1
    if low.dim() > 1 and low.shape[-1] not in (1, x.shape[-1]):
        x = x.unflatten(-1, (low.shape[-1], -1))
        low, high = low.unsqueeze(-1), high.unsqueeze(-1)
    scale = (high - low) / k
    origin = round_straight_through(low / scale)
    codes = torch.clamp(round_straight_through(x / scale) - origin, 0, k)
    return ((codes + origin) * scale).to(dtype).reshape(shape)


def straight_through_live(x, beta, gamma, *, bits, group=None):
    """The same on the live range of each token or group."""
    blocks = x.unflatten(-1, (-1, group or x.shape[-1]))
    low, high = blocks.detach().aminmax(dim=-1, keepdim=True)
    low, high = (end.to(beta.dtype) for end in (low.clamp(max=0), high.clamp(min=0)))
    scale = (gamma * high - beta * low) / (2**bits - 1)
    origin = round_straight_through(beta * low / scale)
    codes = torch.clamp(round_straight_through(blocks / scale) - origin, 0, 2**bits - 1)
    return ((codes + origin) * scale).to(x.dtype).reshape(x.shape)


def torch_core(case):
    """torch's own learnable operator. It takes a scale and a zero point and knows no groups."""
    if case.granularity == "groups" or case.live:
        raise RuntimeError("has no groups and no live ranges")
    k = 2**BITS - 1

    def per_tensor(x, scale, zero_point):
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, 0, k, 1.0)

    def per_channel(x, scale, zero_point):
        axis = 0 if case.granularity == "axis0" else 1
        return torch._fake_quantize_learnable_per_channel_affine(
            x, scale, zero_point, axis, 0, k, 1.0
        )

    return per_tensor if case.granularity == "tensor" else per_channel


def aimet(backend):
    """One of aimet-torch's backends, as its quantizers call it; "asymq" is the one of this
    package."""

    def of(case):
        if case.live:
            raise RuntimeError("has no live ranges")
        try:
            from aimet_torch.quantization import get_backend, set_backend
        except ImportError as error:
            raise RuntimeError(f"not installed: {error}") from error
        with set_backend(backend):
            function = get_backend().quantize_dequantize
        blocks = (1, GROUP) if case.granularity == "groups" else None
        return lambda x, scale, offset: function(x, scale, offset, 0, 2**BITS - 1, blocks)

    return of


def on_ranges(static, live):
    """On the ends of static ranges, or on the factors of live ones."""

    def of(case):
        function = live if case.live else static

        def call(*tensors):
            inputs, learned = tensors[:-2], tensors[-2:]
            return function(case.before(*inputs), *learned, **case.options)

        return call

    return of


def fused(case):
    """The operators, one for all that happens where there is one."""
    if case.granularity == "token_rms_norm":
        return lambda x, weight, *factors: asymq.ops.quantized_rms_norm(x, weight, _token(factors))
    if case.granularity == "token_glu":
        return lambda x, up, *factors: asymq.ops.quantized_glu(x, up, _token(factors))
    static, live = asymq.fake_quantize_min_max, asymq.fake_quantize_dynamic_beta_gamma
    return on_ranges(static, live)(case)


def _token(factors):
    return asymq.ops.RangeArguments("beta_gamma", factors, BITS, token=True)


by_reference = on_ranges(
    reference.fake_quantize_min_max, reference.fake_quantize_dynamic_beta_gamma
)


def compiled(case):
    torch.compiler.reset()
    return torch.compile(by_reference(case))


# quantize and update_codes: integer codes, without gradient, as `forward`.
METHODS = {
    "copy": lambda case: None,
    "quantize": lambda case: None,
    "update_codes": lambda case: None,
    "asymq": fused,
    "straight_through": on_ranges(straight_through, straight_through_live),
    "reference": by_reference,
    "compiled": compiled,
    "torch_core": torch_core,
    "aimet_asymq": aimet("asymq"),
    "aimet_triton": aimet("triton"),
    "aimet_torch": aimet("torch_builtins"),
}
# Reads its scale and zero point on the host, which no graph can hold.
NOT_CAPTURABLE = {"torch_core"}


def learned_tensors(method, case):
    if case.live:
        return [torch.ones(1, device=case.device, requires_grad=True) for _ in range(2)]
    low = torch.full(case.range_shape, -3.0, device=case.device)
    high = torch.full(case.range_shape, 4.0, device=case.device)
    scale = (high - low) / (2**BITS - 1)
    if method == "torch_core":
        low, high = scale.flatten(), (-low / scale).round().flatten()
    if method.startswith("aimet"):
        low, high = scale, (low / scale).round()
    return [low.requires_grad_(), high.requires_grad_()]


def calls(method, case, xs, gs):
    """For each measure a function that returns one callable per buffer; what a backward needs is
    computed when the function is called, outside of the timing."""
    if method == "copy":
        return {"both": lambda: [x[0].detach().clone for x in xs]}
    if method in ("quantize", "update_codes"):
        return {"forward": lambda: code_calls(method, case, [x[0].detach() for x in xs])}
    function = METHODS[method](case)
    learned = learned_tensors(method, case)
    grad = torch.autograd.grad

    def forward(x, g, inputs):
        return lambda: function(*x, *learned)

    def backward(x, g, inputs):
        y = function(*x, *learned)
        return lambda: grad(y, inputs, g, retain_graph=True)

    def both(x, g, inputs):
        return lambda: grad(function(*x, *learned), inputs, g)

    def both_frozen_range(x, g, inputs):
        frozen = [tensor.detach() for tensor in learned]
        return lambda: grad(function(*x, *frozen), x, g)

    def learn_all(make):
        return lambda: [make(x, g, (*x, *learned)) for x, g in zip(xs, gs, strict=True)]

    def freeze_x(make):
        frozen = [tuple(tensor.detach() for tensor in x) for x in xs]
        return lambda: [make(x, g, learned) for x, g in zip(frozen, gs, strict=True)]

    measures = [learn_all(make) for make in (forward, backward, both)]
    if method == "asymq":
        measures += [freeze_x(make) for make in (backward, both)]
        measures += [learn_all(both_frozen_range)]
    return dict(zip(MEASURES, measures, strict=False))


def code_calls(method, case, xs):
    """quantize, or update_codes_ where one code in 200 changes from call to call."""
    if case.live:
        raise RuntimeError("has no live ranges")
    low, high = learned_tensors(method, case)
    grid = asymq.effective_scale_offset("min_max", low, high, bits=BITS)
    if method == "quantize":
        return [partial(asymq.quantize, x, *grid, bits=BITS) for x in xs]
    every = [asymq.quantize(x, *grid, bits=BITS) for x in xs]
    moved = [torch.where(torch.rand(x.shape, device=x.device) < 0.005, -x, x) for x in xs]
    return [
        partial(asymq.update_codes_, codes, x, *grid, bits=BITS)
        for of_turn in (moved, xs)
        for codes, x in zip(every, of_turn, strict=True)
    ]


# ---- timing -----------------------------------------------------------------------------------


def seconds_of(body):
    """Seconds of body() on the GPU, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    body()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def time_graph(functions, repeats, span):
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        # Several buffers: the results stay alive, so that they rotate too.
        kept = [function() for function in functions]
        for _ in range(repeats - 1):
            kept = [function() for function in functions]
    del kept
    graph.replay()
    return median_seconds(lambda: seconds_of(graph.replay), span) / (repeats * len(functions))


def time_eager(functions, repeats, span, cuda):
    def body():
        for _ in range(repeats):
            for function in functions:
                function()

    def wall_clock():
        start = time.perf_counter()
        body()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return median_seconds(wall_clock, span) / (repeats * len(functions))


def measure(method, case, span):
    """Yields (measure, mode, seconds) of one method on one case."""
    cuda = case.device == "cuda"
    large = case.elements >= GRAPH_LEAST
    warm = case.bytes <= WARM_MOST
    buffers = 1 if warm or not cuda else max(2, math.ceil(ROTATION / case.bytes))
    xs = [case.inputs() for _ in range(buffers)]
    gs = [torch.randn(case.shape, device=case.device).to(case.dtype) for _ in range(buffers)]
    graph = cuda and large and method not in NOT_CAPTURABLE
    repeats = (20 if warm else 1) if cuda and large else 1 if large else 100
    for name, prepare in calls(method, case, xs, gs).items():
        functions = prepare()
        for _ in range(3 if cuda or not large else 1):
            functions[0]()
        if cuda:
            torch.cuda.synchronize()
        if graph:
            yield name, f"graph, {'warm' if warm else 'cold'}", time_graph(functions, repeats, span)
        else:
            yield name, "eager", time_eager(functions, repeats, span, cuda)
        del functions
    del xs, gs


# ---- the run ----------------------------------------------------------------------------------


def cases(device, quick, dtypes, granularities):
    small = (4096,), (64, 64)
    weights = [(768, 768), (3072, 768), (768, 3072), (50257, 768)]
    shapes: dict[str, list[tuple[int, ...]]]
    if device == "cpu":
        large = (2048, 3072) if quick else (8192, 3072)
        shapes = {
            "tensor": [small[0], large],
            "axis0": [small[1], large] if quick else [small[1], *weights, large],
            "last_axis": [large],
            "groups": [large],
            "token": [large],
            "token_groups": [large],
            "token_rms_norm": [large],
            "token_glu": [large],
        }
    elif quick:
        shapes = {
            "tensor": [small[0], (6 << 20,), (48 << 20,)],
            "axis0": [small[1], (3072, 768), (16384, 3072)],
            "last_axis": [(16384, 3072)],
            "groups": [(16384, 3072)],
            "token": [(16384, 8192)],
            "token_groups": [(16384, 8192)],
            "token_rms_norm": [(16384, 8192)],
            "token_glu": [(16384, 8192)],
        }
    else:
        sizes = [
            small[0],
            (1 << 20,),
            (3 << 20,),
            (6 << 20,),
            (24 << 20,),
            (48 << 20,),
            (96 << 20,),
        ]
        shapes = {
            "tensor": [*sizes, (400_000_000,)],
            "axis0": [small[1], *weights, (8192, 768), (8192, 3072), (16384, 3072), (32768, 3072)],
            "last_axis": [(3072, 768), (8192, 3072), (16384, 3072), (32768, 3072)],
            "groups": [(3072, 768), (8192, 3072), (16384, 3072), (32768, 3072)],
            "token": [(16384, 2048), (16384, 8192), (8192, 14336)],
            "token_groups": [(16384, 2048), (16384, 8192), (8192, 14336)],
            "token_rms_norm": [(16384, 2048), (16384, 4096), (16384, 8192)],
            "token_glu": [(4096, 8192), (16384, 8192), (8192, 14336)],
        }
    for granularity in granularities:
        for shape in shapes[granularity]:
            for dtype in dtypes:
                yield Case(granularity, shape, DTYPES[dtype], device)


# Compiling takes longer than measuring: a few shapes are enough.
COMPILED: dict[str, set[tuple[int, ...]]] = {
    "cuda": {(48 << 20,), (16384, 3072), (16384, 8192)},
    "cpu": {(8192, 3072)},
}


def markdown(rows, skipped, head):
    """One line per case and method: the time of forward + backward and every measure in copies."""
    lines = ["# Cost of one fake-quantize", "", *(f"- {line}" for line in head), ""]
    lines += [
        "Columns after the time are multiples of copying the tensor once; `frozen x`: without dx, "
        "`frozen range`: dx alone.",
        "",
    ]
    titles: tuple[str, ...] = ("forward", "backward", "both")
    titles += ("backward, frozen x", "both, frozen x", "both, frozen range")
    lines.append(
        "| dtype | granularity | shape | method | mode | both, ms | " + " | ".join(titles) + " |"
    )
    lines.append("|" + "---|" * (6 + len(titles)))
    groups: dict[tuple[str, ...], dict[str, OpTime]] = {}
    for row in rows:
        key = (row.dtype, row.granularity, row.shape, row.method)
        groups.setdefault(key, {})[row.measure] = row
    for case, found in groups.items():
        both = found.get("both")
        values = [f"{found[m].copies:.2f}" if m in found else "" for m in MEASURES]
        time_of_both = f"{both.milliseconds:.4g}" if both else ""
        mode = next(iter(found.values())).mode
        lines.append("| " + " | ".join([*case, mode, time_of_both, *values]) + " |")
    if skipped:
        lines += ["", "Not measured:", "", *(f"- {text}" for text in skipped)]
    return "\n".join(lines) + "\n"


def run(args):
    torch.set_num_threads(args.threads)
    against = recorded.read(args, OpTime, [])
    span = 0.03 if args.quick else 0.06
    head = header(args.device, f"{BITS} bits, min_max, of tokens beta_gamma{_aimet_version()}")
    rows: list[OpTime] = []
    skipped: dict[tuple[str, str], list[str]] = {}
    print("\n".join(head))
    if args.device == "cuda":
        # Autograd runs a backward on the stream of its forward; a capture needs both on its own.
        torch.cuda.set_stream(torch.cuda.Stream())
    else:
        _use_memory()
    start = time.perf_counter()
    path = args.out / f"ops_{args.device}"
    for case in cases(args.device, args.quick, args.dtype, args.granularity):
        measure_case(case, args.only, span, rows, skipped)
        reasons = [
            f"{method}: {reason}: {', '.join(where)}" for (method, reason), where in skipped.items()
        ]
        recorded.save(path, head, rows, markdown(rows, reasons, head), against)
    print(f"{time.perf_counter() - start:.0f} s")
    recorded.tell(path, rows, against)


def _aimet_version():
    try:
        return f", aimet-torch {version('aimet-torch')}"
    except PackageNotFoundError:
        return ""


def _use_memory():
    """The first use of memory, when the system hands it out, is not what is measured."""
    torch.ones(1 << 30)


def measure_case(case, methods, span, rows, skipped):
    dtype = str(case.dtype).removeprefix("torch.")
    shape = "x".join(map(str, case.shape))
    copy = math.nan
    for method in methods:
        if method == "compiled" and (
            case.shape not in COMPILED[case.device] or case.dtype == torch.float16
        ):
            continue
        try:
            for name, mode, seconds in measure(method, case, span):
                if method == "copy":
                    copy = seconds
                row = OpTime(
                    case.device,
                    dtype,
                    case.granularity,
                    shape,
                    method,
                    name,
                    mode,
                    round(seconds * 1e3, 6),
                    round(seconds / copy, 3),
                )
                rows.append(row)
                print(
                    f"{dtype:8} {case.granularity:12} {shape:>11} {method:16} {name:17} {mode:11} "
                    f"{row.milliseconds:10.4f} ms {row.copies:8.2f} copies",
                    flush=True,
                )
        except RuntimeError as error:
            reason = first_line(error)[:100]
            skipped.setdefault((method, reason), []).append(f"{dtype} {case.granularity} {shape}")
            print(
                f"{dtype:8} {case.granularity:12} {shape:>11} {method:16} skipped: {reason}",
                file=sys.stderr,
            )
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()
