"""Low-bit video diffusion transformers: train with quantization in the loop, fold, pack, run.

The public verbs are loaded when they are first asked for, so that `import qvgen` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "PrepareConfig": "qvgen.initializers.prepare",
    "prepare": "qvgen.initializers.prepare",
    "fold": "qvgen.layers.swap",
    "save_packed": "qvgen.deploy.checkpoint",
    "load_packed": "qvgen.deploy.checkpoint",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public verb from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qvgen' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
