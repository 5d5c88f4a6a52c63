"""Builds asymq with CMake against the torch of this environment."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


def torch_root():
    spec = importlib.util.find_spec("torch")
    if spec is None:
        sys.exit(
            "asymq is built against the torch you have: install torch, then run "
            "pip install --no-build-isolation ."
        )
    return Path(spec.origin).parent


def cmake_program():
    program = shutil.which("cmake")
    if program is None:
        sys.exit("asymq is built with CMake 3.24 or later: install cmake (pip install cmake)")
    return program


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package folder."""

    def run(self):
        package = Path(self.build_lib).resolve() / "asymq"
        rpath = ""
        if self.editable_mode:
            package = ROOT / "python" / "asymq"
            rpath = str(torch_root() / "lib")
        version = re.search(r'"(.+)"', _torch_version_line()).group(1)
        # One build tree per torch, so that rebuilding against another one starts afresh.
        build = ROOT / "build" / f"torch-{version}"
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("ASYMQ_BUILD_TYPE", "Release"),
            "CMAKE_INSTALL_PREFIX": str(package),
            "Python3_EXECUTABLE": sys.executable,
            "ASYMQ_TORCH_ROOT": str(torch_root()),
            "ASYMQ_CUDA": os.environ.get("ASYMQ_CUDA", "AUTO"),
            "ASYMQ_EXTRA_RPATH": rpath,
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        print("asymq is configured with")
        for name, value in options.items():
            print(f"  {name} = {value}")
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        cmake = cmake_program()
        subprocess.check_call([cmake, "-S", ROOT, "-B", build, *generator, *definitions])
        subprocess.check_call([cmake, "--build", build, "--target", "asymq", "-j", jobs])
        subprocess.check_call([cmake, "--install", build])

    def get_source_files(self):
        return []

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}

    def copy_extensions_to_source(self):
        """Nothing to copy: an editable build installs into the source folder."""


class AnyPythonWheel(bdist_wheel):
    """The library knows torch but not Python: one wheel serves every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def _torch_version_line():
    text = (torch_root() / "version.py").read_text()
    return re.search(r"^__version__ = .*$", text, re.M).group(0).replace("'", '"')


torch_root()
setup(
    version=re.search(r"VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text()).group(1),
    ext_modules=[Extension("asymq.lib.libasymq", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
