"""Low-bit video diffusion transformers: train with quantization in the loop, fold, pack, run.

    report = qvgen.prepare(model, bits=4, init="mse")   # any transformer of diffusers, in place
    ...                                                 # a training loop of any kind
    qvgen.fold(model)
    qvgen.save_packed(model, "packed")
    model = qvgen.load_packed("packed")                 # runs in its ordinary diffusers pipeline

    WanTransformer3DModel.from_pretrained("packed")     # as any other model of diffusers, once qvgen is imported

Names are loaded when they are first asked for, so that `import qvgen` costs nothing; diffusers is told of the quantization
method "qvgen" when it is imported itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qvgen.after_import import after_import

if TYPE_CHECKING:
    from qvgen.api import PrepareOptions as PrepareOptions
    from qvgen.api import fold as fold
    from qvgen.api import prepare as prepare
    from qvgen.deploy.checkpoint import load_packed as load_packed
    from qvgen.deploy.checkpoint import save_packed as save_packed
    from qvgen.deploy.manifest import Manifest as Manifest
    from qvgen.deploy.quantization_config import QvgenConfig as QvgenConfig
    from qvgen.initializers.base import Initializer as Initializer
    from qvgen.initializers.base import LayerStatistics as LayerStatistics
    from qvgen.initializers.prepare import PrepareConfig as PrepareConfig
    from qvgen.layers.swap import SwapReport as SwapReport
    from qvgen.lowrank.decay import DecaySchedule as DecaySchedule
    from qvgen.methods.base import Method as Method
    from qvgen.methods.phi_decay import PhiDecay as PhiDecay
    from qvgen.quant.attention_profile import AttentionProfile as AttentionProfile
    from qvgen.quant.grid import Grid as Grid
    from qvgen.quant.grid import Profile as Profile

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "prepare": "qvgen.api",
    "fold": "qvgen.api",
    "save_packed": "qvgen.deploy.checkpoint",
    "load_packed": "qvgen.deploy.checkpoint",
    "PrepareOptions": "qvgen.api",
    "QvgenConfig": "qvgen.deploy.quantization_config",
    "PrepareConfig": "qvgen.initializers.prepare",
    "SwapReport": "qvgen.layers.swap",
    "Manifest": "qvgen.deploy.manifest",
    "Profile": "qvgen.quant.grid",
    "Grid": "qvgen.quant.grid",
    "AttentionProfile": "qvgen.quant.attention_profile",
    "Initializer": "qvgen.initializers.base",
    "LayerStatistics": "qvgen.initializers.base",
    "Method": "qvgen.methods.base",
    "PhiDecay": "qvgen.methods.phi_decay",
    "DecaySchedule": "qvgen.lowrank.decay",
}

__all__ = ["__version__", *_HOMES]

after_import("diffusers.quantizers.auto", then="qvgen.deploy.quantization_config")


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qvgen' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, also those that were not used yet."""
    return sorted({*globals(), *__all__})
