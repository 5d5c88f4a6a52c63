"""Rules that keep the design: the mathematics once, kernels without torch, no host syncs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sources(*folders, suffixes=(".h", ".cpp", ".cu", ".cuh")):
    files = [p for folder in folders for p in sorted((ROOT / folder).rglob("*"))]
    files = [p for p in files if p.suffix in suffixes]
    assert files, f"no sources in {folders}"
    return files


def code(path):
    """Without comments and string literals, which may talk about anything."""
    text = re.sub(r"//.*|/\*[\s\S]*?\*/", "", path.read_text())
    return re.sub(r'(?<!include )"(\\.|[^"\\\n])*"', '""', text)


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def found(pattern, files):
    return [str(p.relative_to(ROOT)) for p in files if re.search(pattern, code(p))]


def test_rounding_is_written_once():
    rounds = r"\b(ll?rint|rint|nearbyint|ll?round|round|roundeven|__float2int_r\w)f?\b|_round_p[sd]"
    assert found(rounds, sources("csrc", "cuda")) == ["csrc/include/asymq/quant_math.h"]


def test_the_mathematics_knows_no_torch():
    for header in ("quant_math.h", "parameterization.h"):
        names = includes(ROOT / "csrc/include/asymq" / header)
        assert not [n for n in names if re.match(r"torch/|ATen/|c10/", n)], header


def test_cuda_kernels_know_no_torch():
    for path in sources("cuda", suffixes=(".cu", ".cuh")):
        names = includes(path)
        assert not [n for n in names if re.match(r"torch/|ATen/|c10/", n)], path.name


def test_nothing_waits_for_the_device():
    waits = r"\.item\s*(<|\()|cudaDeviceSynchronize|cudaStreamSynchronize|cudaMemcpy\b|\.cpu\(\)"
    assert found(waits, sources("csrc", "cuda")) == []


def test_sums_need_no_float_atomics():
    assert found(r"\batomicAdd\b|\bred\.", sources("cuda")) == []


@pytest.mark.parametrize("folder, forbidden", [("csrc", "cuda/"), ("cuda", "csrc/")])
def test_dependencies_point_one_way(folder, forbidden):
    """cuda/ includes from csrc/include and itself, csrc/ never from cuda/."""
    own = {p.name for p in sources("cuda")}
    public = {p.name for p in sources("csrc/include")}
    for path in sources(folder):
        for name in includes(path):
            assert not name.startswith(("../", forbidden)), f"{path.name} includes {name}"
            if folder == "csrc":
                assert name not in own, f"{path.name} includes {name}"
            elif name.startswith("asymq/"):
                assert Path(name).name in public, f"{path.name} includes {name}"
            elif "/" not in name and name.endswith((".h", ".cuh")) and not name.startswith("cuda"):
                assert name in own, f"{path.name} includes {name}"


def test_public_headers_include_no_private_ones():
    private = {p.relative_to(ROOT / "csrc").parts[0] for p in sources("csrc")} - {"include"}
    for path in sources("csrc/include"):
        for name in includes(path):
            assert name.split("/")[0] not in private, f"{path.name} includes {name}"


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 150


def test_reference_needs_torch_alone():
    names = re.findall(
        r"^(?:from|import) (\w+)", (ROOT / "python/asymq/reference.py").read_text(), re.M
    )
    assert set(names) <= {"__future__", "collections", "typing", "torch"}
