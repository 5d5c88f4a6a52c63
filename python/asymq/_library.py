"""Loads the C++ library, or says in one sentence why it cannot."""

from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "lib" / "libasymq.so"
_BUILD = "in its source folder run: pip install --no-build-isolation --force-reinstall --no-deps ."


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def load() -> None:
    try:
        from asymq import _build
    except ImportError:
        raise ImportError(f"asymq in {PACKAGE} has not been built; {_BUILD}") from None
    # torch's binary interface changes with every minor version: compare before the loader fails
    # with an undefined symbol.
    if _minor(_build.TORCH_VERSION) != _minor(torch.__version__):
        raise ImportError(
            f"asymq {_build.VERSION} was built for torch {_build.TORCH_VERSION}, "
            f"but this is torch {torch.__version__}; {_BUILD}"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(f"asymq could not load {LIBRARY}: {error}; {_BUILD}") from error
