"""Chooses what implements the operators: the native library where one fits this torch, else single
operations of PyTorch. ASYMQ_NATIVE=0 chooses the latter, ASYMQ_NATIVE=1 makes it an error."""

import os
import sys
import warnings
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "lib" / "libasymq.so"
_BUILD = "in its source folder run: pip install --no-build-isolation --force-reinstall --no-deps ."

try:
    from asymq import _build
except ImportError:
    raise ImportError(f"asymq in {PACKAGE} has not been built; {_BUILD}") from None

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


def _install_command() -> str:
    if sys.platform != "linux":
        return f"there is none for {sys.platform}"
    return (
        f"for those of torch {torch.__version__} run: {sys.executable} -m pip install "
        "--no-build-isolation --force-reinstall --no-deps --no-binary asymq "
        f"asymq=={_build.VERSION}"
    )


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
                raise ImportError(f"{error}; {_BUILD}") from error.__cause__
            _reason = str(error)
            warnings.warn(
                f"asymq runs on composite operators, slower than native ones: {_reason}; "
                f"{_install_command()} (ASYMQ_NATIVE=0 silences this)",
                stacklevel=2,
            )
        else:
            cuda = f" and CUDA {_build.CUDA_VERSION}" if _build.CUDA_ARCHITECTURES else ""
            _implementation = f"native, CPU{cuda}"
            _reason = f"{LIBRARY.name} was built for torch {_build.TORCH_VERSION}"
            return
    from asymq import composite

    composite.register()
