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
            f"asymq is built against the torch you have, and {sys.executable} has none: install "
            f"torch there, then run {sys.executable} -m pip install --no-build-isolation ."
        )
    return Path(spec.origin).parent


def first_match(pattern, path):
    return re.search(pattern, path.read_text(), re.MULTILINE).group(1)


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package folder."""

    def run(self):
        cmake = shutil.which("cmake")
        if cmake is None:
            sys.exit("asymq is built with CMake 3.24 or later: install cmake (pip install cmake)")
        torch = torch_root()
        package = ROOT / "python" if self.editable_mode else Path(self.build_lib).resolve()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": package / "asymq",
            "Python3_EXECUTABLE": sys.executable,
            "ASYMQ_TORCH_ROOT": torch,
            "ASYMQ_CUDA": os.environ.get("ASYMQ_CUDA", "AUTO"),
            "ASYMQ_EDITABLE": "ON" if self.editable_mode else "OFF",
        }
        print("asymq is configured with")
        for name, value in options.items():
            print(f"  {name} = {value}")
        # One build tree per torch and generator, so that building with another one starts afresh.
        version = first_match(r"^__version__ = ['\"](.+)['\"]", torch / "version.py")
        generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
        build = ROOT / "build" / f"torch-{version}-{generator.split()[-1].lower()}"
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.check_call([cmake, "-S", ROOT, "-B", build, "-G", generator, *definitions])
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


torch_root()  # before anything else, with its clear message
setup(
    version=first_match(r"^project\(asymq VERSION ([\d.]+)", ROOT / "CMakeLists.txt"),
    ext_modules=[Extension("asymq.lib.libasymq", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
