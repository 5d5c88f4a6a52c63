"""Chooses what implements the operators: the native library where one fits this torch, else single
operations of PyTorch. ASYMQ_NATIVE=0 chooses the latter, ASYMQ_NATIVE=1 makes it an error."""

import json
import os
import shlex
import sys
import warnings
from importlib import metadata
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "lib" / "libasymq.so"


def _source() -> list[str] | None:
    """What pip makes asymq of: the source folder that this package lies in or was installed from,
    the index that it came from; None where pip recorded neither."""
    folder = PACKAGE.parents[1]
    if (folder / "csrc").is_dir():
        return ["--editable", str(folder)]
    for package in metadata.distributions(name="asymq", path=[str(PACKAGE.parent)]):
        origin = json.loads(package.read_text("direct_url.json") or "{}")
        if not origin:
            return ["--no-binary", "asymq", f"asymq=={_build.VERSION}"]
        if "dir_info" in origin:
            return [origin["url"]]
    return None


def _build_command() -> str:
    """The one line that builds asymq against this torch."""
    source = _source()
    options = ["--no-build-isolation", "--force-reinstall", "--no-deps", *(source or ["."])]
    where = "" if source else "in its source folder "
    return f"{where}run: {shlex.join([sys.executable, '-m', 'pip', 'install', *options])}"


try:
    from asymq import _build
except ImportError:
    raise ImportError(f"asymq in {PACKAGE} has not been built; {_build_command()}") from None

_implementation = "composite"
_reason = ""


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _load_native() -> None:
    """ImportError: there is no library that fits this torch."""
    if not _build.TORCH_VERSION:
        raise ImportError(f"asymq {_build.VERSION} was built without its native library")
    # torch's binary interface changes with every minor version: compare before the loader fails
    # with an undefined symbol.
    if _minor(_build.TORCH_VERSION) != _minor(torch.__version__):
        raise ImportError(
            f"asymq {_build.VERSION} was built for torch {_build.TORCH_VERSION}, but this is torch "
            f"{torch.__version__}"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(f"asymq could not load {LIBRARY}: {error}") from error


def implementation() -> str:
    """What runs: "native, CPU and CUDA 13.0", "native, CPU" or "composite"."""
    return _implementation


def why() -> str:
    """Why it is this one."""
    return _reason


def load() -> None:
    global _implementation, _reason
    wanted = os.environ.get("ASYMQ_NATIVE", "")
    if wanted not in ("", "0", "1"):
        raise ImportError(
            "ASYMQ_NATIVE must be 0 (composite operators), 1 (native ones or an error) or not set, "
            f"got {wanted!r}"
        )
    if wanted == "0":
        _reason = "ASYMQ_NATIVE=0"
    else:
        try:
            _load_native()
        except ImportError as error:
            if wanted == "1":
                raise ImportError(f"{error}; {_build_command()}") from error.__cause__
            _reason = str(error)
            native = f"for those of torch {torch.__version__} {_build_command()}"
            if sys.platform != "linux":
                native = f"there are none for {sys.platform}"
            warnings.warn(
                f"asymq runs on composite operators, slower than native ones: {_reason}; "
                f"{native} (ASYMQ_NATIVE=0 silences this)",
                stacklevel=2,
            )
        else:
            cuda = f" and CUDA {_build.CUDA_VERSION}" if _build.CUDA_ARCHITECTURES else ""
            _implementation = f"native, CPU{cuda}"
            _reason = f"{LIBRARY.name} was built for torch {_build.TORCH_VERSION}"
            return
    from asymq import composite

    composite.register()
