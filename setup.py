"""Builds asymq: with its native library against the torch of this environment, else pure.

Where there is no torch, as in an isolated build, or with ASYMQ_NATIVE=0, the operators are the
composite ones alone, which run with any torch. ASYMQ_NATIVE=1 makes a missing torch an error.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


def torch_root():
    """Folder of the torch to build against; None: to build none."""
    wanted = os.environ.get("ASYMQ_NATIVE", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"ASYMQ_NATIVE must be 0, 1 or not set, got {wanted!r}")
    spec = None if wanted == "0" else importlib.util.find_spec("torch")
    # A folder of this name that is no package has no origin.
    origin = spec and spec.origin
    if origin is None and wanted == "1":
        sys.exit(
            f"asymq is built against the torch you have, and {sys.executable} has none: install "
            f"torch there, then run {sys.executable} -m pip install --no-build-isolation ."
        )
    return origin and Path(origin).parent


def first_match(pattern, path):
    return re.search(pattern, path.read_text(), re.MULTILINE).group(1)


TORCH = torch_root()
VERSION = first_match(r"^project\(asymq VERSION ([\d.]+)", ROOT / "CMakeLists.txt")


class PureBuild(build_py):
    """Says in _build.py that there is no library, which CMake does where it makes one."""

    def run(self):
        super().run()
        package = ROOT / "python" if self.editable_mode else Path(self.build_lib)
        template = (ROOT / "csrc" / "cmake" / "_build.py.in").read_text()
        text = re.sub(r"@\w+@", "", template.replace("@PROJECT_VERSION@", VERSION))
        (package / "asymq" / "_build.py").write_text(text.replace('= " "', '= ""'))


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package folder."""

    def run(self):
        cmake = shutil.which("cmake")
        if cmake is None:
            sys.exit("asymq is built with CMake 3.24 or later: install cmake (pip install cmake)")
        package = ROOT / "python" if self.editable_mode else Path(self.build_lib).resolve()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": package / "asymq",
            "Python3_EXECUTABLE": sys.executable,
            "ASYMQ_TORCH_ROOT": TORCH,
            "ASYMQ_CUDA": os.environ.get("ASYMQ_CUDA", "AUTO"),
            "ASYMQ_KERNELS": os.environ.get("ASYMQ_KERNELS", ""),
            "ASYMQ_EDITABLE": "ON" if self.editable_mode else "OFF",
        }
        print("asymq is configured with")
        for name, value in options.items():
            print(f"  {name} = {value}")
        # One build tree per torch and generator, so that building with another one starts afresh.
        version = first_match(r"^__version__ = ['\"](.+)['\"]", TORCH / "version.py")
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


setup(
    # ASYMQ_LOCAL_VERSION, such as +pt2.15.cu130, tells the wheels of a release apart.
    version=VERSION + os.environ.get("ASYMQ_LOCAL_VERSION", ""),
    ext_modules=[Extension("asymq.lib.libasymq", sources=[])] if TORCH else [],
    cmdclass={
        "build_ext": CMakeBuild,
        "bdist_wheel": AnyPythonWheel,
        **({} if TORCH else {"build_py": PureBuild}),
    },
)
