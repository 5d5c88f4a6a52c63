"""Wheels built from this checkout, native and pure, installed where nothing of it can be seen."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "ASYMQ_NATIVE")

pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    """Without the variables that would lead back to this checkout."""
    clean = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
    )


def checked(*command, cwd, **environment):
    result = run(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made in the checkout, whose objects CMake need not compile again."""
    folder = tmp_path_factory.mktemp("wheel")
    # What setuptools finds there it takes for the package.
    for old in (ROOT / "build").glob("lib*"):
        shutil.rmtree(old)
    checked(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", folder, ROOT),
        cwd=folder,
    )
    (wheel,) = folder.glob("asymq-*.whl")
    return wheel


def environment(folder, wheel):
    """The interpreter of a fresh environment with the wheel; torch is borrowed, after it on the
    path."""
    checked(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(
        checked(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)[:-1]
    )
    checked(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel), cwd=folder
    )
    borrowed = {sysconfig.get_paths()["purelib"], str(Path(torch.__file__).parents[1])}
    # Only the folders: the .pth files in them, an editable asymq's among them, are not followed.
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("installed"), wheel)


STEP = """
import asymq, torch
x = torch.tensor([-9.0, 0.3, 9.0], requires_grad=True)
ends = [torch.tensor(v, requires_grad=True) for v in (-1.0, 2.0)]
xhat = asymq.fake_quantize_min_max(x, *ends, bits=2)
xhat.sum().backward()
print(asymq.__file__)
print(xhat.tolist(), x.grad.tolist(), [e.grad.item() for e in ends])
"""


def test_forward_and_backward(python):
    site = python.parents[1]
    file, values = checked(python, "-c", STEP, cwd=site).splitlines()
    assert file.startswith(str(site))
    xhat, rest = values.split("] ", 1)
    assert xhat == "[-1.0, 0.0, 2.0"
    assert rest.startswith("[0.0, 1.0, 0.0] [1.1")


MODULES = """
import importlib, pkgutil, asymq
for module in pkgutil.walk_packages(asymq.__path__, "asymq."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print(module.name, "needs", error.name)
        else:
            print(module.name)
"""
EXTRAS = {"transformers", "tokenizers", "datasets", "numpy", "tqdm", "matplotlib"}
HOSTS = {"aimet_torch", "modelopt"}  # of the plug-ins


def test_all_modules_are_in_the_wheel(python):
    """A module that is imported needs an extra, a plug-in what it goes into, and all others nothing
    but what the wheel depends on."""
    found = [
        line.split() for line in checked(python, "-c", MODULES, cwd=python.parent).splitlines()
    ]
    files = (ROOT / "python" / "asymq").rglob("*.py")
    modules = [path.relative_to(ROOT / "python").with_suffix("").parts for path in files]
    expected = {".".join(part for part in parts if part != "__init__") for parts in modules}
    assert {name for name, *_ in found} == expected - {"asymq", "asymq.__main__"}
    assert {needed for _, *rest in found for needed in rest[1:]} <= EXTRAS | HOSTS


def test_info(python):
    text = checked(python, "-m", "asymq", "--info", cwd=python.parent)
    for expected in ("asymq", f"torch {torch.__version__}", "CUDA", str(python.parents[1])):
        assert expected in " ".join(text.split())


def test_cmake_package_and_types_are_in_the_wheel(python):
    prefix = Path(checked(python, "-m", "asymq", "--cmake-prefix-path", cwd=python.parent).strip())
    assert prefix.is_relative_to(python.parents[1])
    assert list(prefix.rglob("asymqConfig.cmake"))
    package = next(python.parents[1].rglob("site-packages/asymq"))
    assert (package / "py.typed").exists()
    assert (package / "include" / "asymq" / "asymq.h").exists()


def test_exported_files_hold_no_build_paths(wheel, python):
    package = next(python.parents[1].rglob("site-packages/asymq"))
    files = [p for p in package.rglob("*") if p.suffix in (".cmake", ".py", ".h")]
    for path in files:
        for folder in (str(wheel.parent), str(ROOT)):
            assert folder.encode() not in path.read_bytes(), f"{path.name} names {folder}"


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """An interpreter with the pure wheel, and torch, which is not there when the wheel is made."""
    folder = tmp_path_factory.mktemp("pure")
    source = folder / "source"
    for name in ("csrc/cmake", "python"):
        ignored = shutil.ignore_patterns("_build.py", "lib", "include", "share", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    checked(sys.executable, "-m", "venv", folder / "builder", cwd=folder)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    borrow(folder / "builder" / "bin" / "python", "setuptools", "_distutils_hack", "wheel")
    text = checked(folder / "builder" / "bin" / "python", "-c", build, cwd=source)
    wheel = folder / text.splitlines()[-1]
    assert wheel.name.endswith("-py3-none-any.whl")
    return environment(folder, wheel)


def borrow(python, *names):
    """Some packages of this environment, and no others."""
    site = Path(
        checked(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=ROOT)[:-1]
    )
    for name in names:
        package = Path(importlib.util.find_spec(name).origin).parent
        shutil.rmtree(site / name, ignore_errors=True)
        (site / name).symlink_to(package)


def test_the_pure_wheel_computes_the_same(python, pure):
    results = [
        checked(p, "-W", "ignore", "-c", STEP, cwd=p.parents[1]).splitlines()[1]
        for p in (python, pure)
    ]
    assert results[0] == results[1]


def test_the_pure_wheel_says_what_it_is(pure):
    result = run(pure, "-c", "import asymq; print(asymq.implementation())", cwd=pure.parent)
    assert result.stdout == "composite\n"
    assert "was built without its native library" in result.stderr
    assert f"run: {pure} -m pip install" in result.stderr
    text = checked(pure, "-W", "ignore", "-m", "asymq", "--info", cwd=pure.parent)
    assert "(built for any)" in text and "composite (asymq" in text
    result = run(pure, "-W", "ignore", "-m", "asymq", "--cmake-prefix-path", cwd=pure.parent)
    assert result.returncode != 0 and "without its C++ library" in result.stderr
    result = run(pure, "-c", "import asymq", cwd=pure.parent, ASYMQ_NATIVE="1")
    assert "ImportError" in result.stderr.splitlines()[-1]


def test_a_native_build_without_torch_names_the_missing_flag(tmp_path):
    """Plain `pip install .` gives the build setuptools and no torch: with ASYMQ_NATIVE=1 that is
    an error."""
    (tmp_path / "CMakeLists.txt").write_text((ROOT / "CMakeLists.txt").read_text())
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    for name in ("setuptools", "_distutils_hack", "wheel"):
        package = Path(importlib.util.find_spec(name).origin).parent
        (tmp_path / name).symlink_to(package)
    command = sys.executable, "-S", "setup.py", "--version"
    assert checked(*command, cwd=tmp_path).strip()
    result = run(*command, cwd=tmp_path, ASYMQ_NATIVE="1")
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert "--no-build-isolation" in message
    assert f"{sys.executable} has none" in message
    result = run(*command, cwd=tmp_path, ASYMQ_NATIVE="2")
    assert "ASYMQ_NATIVE must be 0, 1 or not set, got '2'" in result.stderr


def test_a_build_tree_per_generator(tmp_path):
    """Ninja may be installed between two builds."""
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("asymq", "asymq/experiments", "asymq/models"):
        (tmp_path / "python" / name).mkdir(parents=True, exist_ok=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    trees = {}
    for tool, generator in (("cmake", "Unix Makefiles"), ("ninja", "Ninja")):
        (tools / tool).write_text('#!/bin/sh\necho "[$@]"\n')
        (tools / tool).chmod(0o755)
        text = checked(sys.executable, "setup.py", "build_ext", cwd=tmp_path, PATH=str(tools))
        assert f"-G {generator} " in text
        trees[generator] = text.split(" -B ")[1].split()[0]
    assert trees["Ninja"] != trees["Unix Makefiles"]
    assert all(f"torch-{torch.__version__}" in tree for tree in trees.values())


FIND_TORCH = """
cmake_minimum_required(VERSION 3.24)
project(find_torch LANGUAGES CXX)
include(%s/csrc/cmake/libtorch.cmake)
message(STATUS "found ${ASYMQ_TORCH_VERSION}, CUDA [${ASYMQ_TORCH_CUDA_MAJOR}]")
"""


@pytest.mark.parametrize(
    "version, files, cuda",
    [
        ("2.11.0+cpu", (), ""),
        ("2.11.0+cu126", (), "12"),
        ("2.15.0+cu132", ("libcudart-9335f6a2.so.13",), "13"),
        ("2.15.0", ("libcudart.so.13", "libcudart.so.13.2.1"), "13"),
    ],
)
def test_finds_libtorch_without_python(version, files, cuda, tmp_path):
    root = tmp_path / "libtorch"
    (root / "lib").mkdir(parents=True)
    (root / "build-version").write_text(f"{version}\n")
    for name in ("libtorch_cpu.so", *files):
        (root / "lib" / name).touch()
    (tmp_path / "CMakeLists.txt").write_text(FIND_TORCH % ROOT)
    text = checked("cmake", f"-DASYMQ_TORCH_ROOT={root}", "-B", "build", cwd=tmp_path)
    assert f"found {version}, CUDA [{cuda}]" in text


def test_a_folder_without_torch_is_one_clear_sentence(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(FIND_TORCH % ROOT)
    result = run("cmake", f"-DASYMQ_TORCH_ROOT={tmp_path}", "-B", "build", cwd=tmp_path)
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert f"ASYMQ_TORCH_ROOT={tmp_path} is not torch's folder" in message
    assert "version.py" in message and "build-version" in message
