"""The composite operators beside the native ones, and which of them an import chooses. The suite's
tests that are marked composite run on them, too: ASYMQ_NATIVE=0 pytest -m "composite and not
native".
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_bit_equal, assert_sums
from fused import assert_same_codes, flat, quantizer
from samples import SAMPLES
from tiny_models import gpt2, logits, prepared, tokens, train

import asymq
from asymq.composite.schema import SCHEMAS

PACKAGE = Path(asymq.__file__).parent
SUPPORT = Path(__file__).parent / "support"
pytestmark = pytest.mark.skipif(
    asymq.implementation() == "composite", reason="compares with the native operators"
)


def run(code: str, *arguments, path: Path = PACKAGE.parent, native: str | None = "0"):
    """A process of its own, with ASYMQ_NATIVE or without it."""
    environment = {k: v for k, v in os.environ.items() if k != "ASYMQ_NATIVE"}
    environment |= {} if native is None else {"ASYMQ_NATIVE": native}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (path, SUPPORT, SUPPORT.parent)))}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def checked(*arguments, **keywords) -> str:
    result = run(*arguments, **keywords)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- the same operators ------------------------------------------------------------------------


def test_schemas_are_the_native_ones():
    """Defaults and names of results included, and none is missing."""
    names = {schema.split("(")[0] for schema in SCHEMAS}
    registered = {
        name.removeprefix("asymq::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("asymq::")
    }
    assert len(names) == len(SCHEMAS) and names == registered
    for schema in SCHEMAS:
        native = getattr(torch.ops.asymq, schema.split("(")[0]).default
        assert str(torch._C.parse_schema(f"asymq::{schema}")) == str(native._schema)
        assert torch.Tag.pt2_compliant_tag in native.tags


def fake_quantized(sample) -> list[torch.Tensor]:
    """x̂, dL/dx, then the gradients of what learns."""
    x, parameters, grad = sample.build()
    xhat = sample.call(asymq, x, *parameters)
    leaves = (x, *parameters[: len(sample.spec.learned)])
    return [xhat.detach(), *torch.autograd.grad(xhat, leaves, grad)]


def fused_results(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Of every operator that does more than quantize: its result, then the gradients."""
    torch.manual_seed(0)
    ops = torch.ops.asymq
    x = torch.randn(2, 3, 5, 16).to(dtype).requires_grad_()
    up = torch.randn(2, 3, 5, 16).to(dtype).requires_grad_()
    weight = torch.rand(16).to(dtype).requires_grad_()
    labels = torch.tensor([0, 15, -100, 7, 3])
    mask = torch.where(torch.rand(2, 1, 5, 16) < 0.2, -1e4, 0.5)

    def ranges(*names: str):
        made = [quantizer(name, -1.1, 1.7, torch.float32, "cpu") for name in names]
        learned = [t for range_ in made for t in range_.parameters if t.requires_grad]
        return learned, [part for range_ in made for part in flat(range_)]

    results = {}

    def add(name: str, leaves: list[torch.Tensor], out: torch.Tensor) -> None:
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        results[name] = [out.detach(), *gradients]

    learned, flat_ranges = ranges("min_max", "beta_gamma")
    out = ops.quantized_softmax(x, mask, True, *flat_ranges, 4)
    add("softmax", [x, *learned], out)
    sight = mask[..., :5], True, 0.25
    out = ops.quantized_attention(x, up[:, :1], x[:, :1] + up[:, :1], *sight, *flat_ranges)
    add("attention", [x, up, *learned], out)
    learned, flat_ranges = ranges("scale_offset", "symmetric_gamma_softplus")
    add("gelu", [x, *learned], ops.quantized_gelu(x, *flat_ranges))
    rows = x.flatten()[:80].reshape(5, 16).detach().requires_grad_()
    learned, flat_ranges = ranges("kscale_koffset")
    add("loss", [rows, *learned], ops.quantized_cross_entropy(rows, labels, -100, *flat_ranges))
    teacher = up.detach().flatten()[:80].reshape(5, 16)
    out = ops.quantized_kl_div(rows, teacher, labels, 2.0, -100, *flat_ranges)
    add("kl_div", [rows, *learned], out)
    learned, flat_ranges = ranges("dynamic_beta_gamma")
    out = ops.quantized_rms_norm(x, weight, 1e-6, *flat_ranges)
    add("rms_norm", [x, weight, *learned], out)
    learned, flat_ranges = ranges("min_max", "symmetric_max", "symmetric_scale", "min_max")
    add("glu", [x, up, *learned], ops.quantized_glu(x, up, "gelu_tanh", *flat_ranges))
    return results


RESULTS = """
import sys, torch, test_composite
from samples import SAMPLES
results = [test_composite.fake_quantized(sample) for sample in SAMPLES]
fused = [test_composite.fused_results(dtype) for dtype in test_composite.DTYPES]
torch.save((results, fused), sys.argv[1])
"""
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The composite operators' results."""
    file = tmp_path_factory.mktemp("results") / "results.pt"
    checked(RESULTS, file)
    return torch.load(file)


def test_fake_quantize(results):
    """The result and dL/dx to the bit, but where float64 exponentials of two libraries meet."""
    for sample, actual in zip(SAMPLES, results[0], strict=True):
        expected = fake_quantized(sample)
        for a, e in zip(actual[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, e) if sample.loose else assert_bit_equal(a, e)
        terms = sample.build().grad.double().abs().sum() * 2**sample.bits
        for a, e in zip(actual[2:], expected[2:], strict=True):
            assert a.stride() == e.stride()
            assert_sums(a, e, terms.expand(e.shape))


@pytest.mark.parametrize("number", range(len(DTYPES)), ids=map(str, DTYPES))
def test_fused(results, number):
    """Codes are those of the native operators; gradients go with the sums of their terms."""
    expected = fused_results(DTYPES[number])
    tolerance = 1e-2 if DTYPES[number] == torch.bfloat16 else 1e-4
    for name, actual in results[1][number].items():
        if name in ("loss", "kl_div"):
            torch.testing.assert_close(actual[0], expected[name][0])
        else:
            assert_same_codes(actual[0], expected[name][0], expected[name][0])
        for a, e in zip(actual[1:], expected[name][1:], strict=True):
            assert (a.shape, a.dtype) == (e.shape, e.dtype)
            largest = e.double().abs().max()
            assert ((a - e).double().abs() <= tolerance * (largest + 1e-3)).all(), name


def trained(folder: Path) -> list[float]:
    """Losses of a small model, which is saved."""
    model = prepared(gpt2())
    losses = train(model, steps=3, lr=1e-3)
    asymq.save(model, folder)
    torch.save(logits(model, tokens()), folder / "logits.pt")
    return losses


TRAINED = """
import sys, pathlib, test_composite, asymq
assert asymq.implementation() == "composite"
print(*test_composite.trained(pathlib.Path(sys.argv[1])))
"""
LOADED = """
import sys, torch, asymq
from tiny_models import logits, tokens
torch.save(logits(asymq.load(sys.argv[1]), tokens()), sys.argv[2])
"""


def test_a_model_is_trained_saved_and_loaded_alike(tmp_path):
    native, composite = tmp_path / "native", tmp_path / "composite"
    losses = trained(native)
    others = [float(loss) for loss in checked(TRAINED, composite).split()]
    torch.testing.assert_close(others, losses, rtol=1e-3, atol=0)
    checked(LOADED, native, tmp_path / "loaded.pt")
    for actual, expected in (
        (logits(asymq.load(composite), tokens()), torch.load(composite / "logits.pt")),
        (torch.load(tmp_path / "loaded.pt"), torch.load(native / "logits.pt")),
    ):
        # A code may be one off where sums round otherwise.
        assert (actual - expected).abs().max() <= 0.02 * expected.abs().max()


EXPORTED = """
import sys, torch
import asymq
program = torch.export.load(sys.argv[1])
x = torch.linspace(-2, 2, 24).reshape(4, 6)
torch.save(program.module()(x), sys.argv[2])
"""


def test_an_exported_program_runs_on_either(tmp_path):
    """Names of private operators in it are the same."""

    class Quantizer(torch.nn.Module):
        def forward(self, x):
            low, high = torch.tensor([-1.0]), torch.tensor([1.5])
            return asymq.fake_quantize_min_max(x, low, high, bits=4)

    x = torch.linspace(-2, 2, 24).reshape(4, 6)
    program = torch.export.export(Quantizer(), (x,)).run_decompositions()
    assert "asymq._fake_quantize.default" in str(program.graph)
    torch.export.save(program, tmp_path / "program.pt2")
    checked(EXPORTED, tmp_path / "program.pt2", tmp_path / "out.pt")
    assert_bit_equal(torch.load(tmp_path / "out.pt"), Quantizer()(x))


def test_mps_is_refused_in_a_sentence():
    from asymq.composite.checks import check_elements

    class OnMps:
        dtype, device = torch.float32, torch.device("mps")

    with pytest.raises(RuntimeError, match=r"asymq::op: .*float64, .* mps .*: move .* to the CPU"):
        check_elements("op", "x", OnMps())  # type: ignore[arg-type]


# ---- which of them an import chooses -----------------------------------------------------------

SAY = "import asymq; print(asymq.implementation())"


@pytest.fixture
def copied(tmp_path):
    """What chooses, and what is chosen, to change: a package that imports no more than that."""
    package = tmp_path / "asymq"
    shutil.copytree(PACKAGE / "lib", package / "lib")
    shutil.copytree(PACKAGE / "composite", package / "composite")
    for name in ("_build", "_library", "reference"):
        shutil.copy(PACKAGE / f"{name}.py", package)
    lines = ("from asymq import _library", "from asymq._library import implementation")
    (package / "__init__.py").write_text("\n".join((*lines, "_library.load()", "")))
    return tmp_path


def built_for(folder: Path, torch_version: str) -> None:
    build = folder / "asymq" / "_build.py"
    build.write_text(build.read_text().replace(torch.__version__, torch_version))


@pytest.mark.parametrize("native, expected", [(None, "native"), ("1", "native"), ("0", "compos")])
def test_a_library_that_fits(native, expected):
    result = run(SAY, native=native)
    assert result.stdout.startswith(expected) and not result.stderr


def test_other_values_are_refused():
    result = run(SAY, native="yes")
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: ASYMQ_NATIVE must be 0 ") and "'yes'" in message


@pytest.mark.parametrize(
    "version, why", [("2.3.1+cu118", "built for torch 2.3.1"), ("", "without")]
)
def test_a_library_that_does_not_fit(copied, version, why):
    """One line that says so and what to run; an error where the native one is asked for."""
    built_for(copied, version)
    result = run(SAY, path=copied, native=None)
    assert result.stdout == "composite\n"
    (warning,) = [line for line in result.stderr.splitlines() if "UserWarning" in line]
    for part in (why, torch.__version__, "-m pip install --no-build-isolation", "ASYMQ_NATIVE=0"):
        assert part in warning
    assert not run(SAY, path=copied, native="0").stderr
    message = run(SAY, path=copied, native="1").stderr.splitlines()[-1]
    assert message.startswith("ImportError: asymq") and why in message and "pip install" in message


@pytest.mark.parametrize(
    "record, where, expected",
    [
        ("", "; for those of torch", f"--no-binary asymq asymq=={asymq.__version__}"),
        ('{"url": "file:///a%20b", "dir_info": {}}', "; for those of torch", "file:///a%20b"),
        ('{"url": "file:///a.whl", "archive_info": {}}', "in its source folder", "."),
        (None, "in its source folder", "."),
    ],
    ids=["index", "folder", "wheel", "copy"],
)
def test_the_command_is_for_where_it_came_from(record, where, expected, copied):
    """What pip recorded of it; of an index nothing."""
    built_for(copied, "2.3.1")
    if record is not None:
        info = copied / f"asymq-{asymq.__version__}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: asymq\nVersion: {asymq.__version__}\n")
        if record:
            (info / "direct_url.json").write_text(record)
    (line,) = [x for x in run(SAY, path=copied, native=None).stderr.splitlines() if "pip" in x]
    options = "-m pip install --no-build-isolation --force-reinstall --no-deps"
    assert where in line and f"run: {sys.executable} {options} {expected} (ASYMQ" in line


def test_the_command_of_a_source_folder_builds_it_there(copied):
    folder = copied / "python"
    folder.mkdir()
    (copied / "asymq").rename(folder / "asymq")
    (copied / "csrc").mkdir()
    (folder / "asymq" / "_build.py").unlink()
    message = run(SAY, path=folder, native=None).stderr.splitlines()[-1]
    assert "has not been built; run: " in message
    assert message.endswith(f"--no-deps --editable {copied}")


def test_a_library_that_cannot_be_loaded(copied):
    (copied / "asymq" / "lib" / "libasymq.so").unlink()
    result = run(SAY, path=copied, native=None)
    assert result.stdout == "composite\n" and "libasymq.so" in result.stderr
    message = run(SAY, path=copied, native="1").stderr.splitlines()[-1]
    assert message.startswith("ImportError: asymq could not load") and "pip install" in message


def test_info_says_which_and_why():
    for native, expected in (("0", "composite (ASYMQ_NATIVE=0)"), ("1", "native, CPU")):
        result = run("import asymq.__main__ as main; print(main.info())", native=native)
        assert f"operators           {expected}" in result.stdout
