"""Resolvers: the functions that the files of conf/ call.

``${bits_label:w4a8}`` -> w4a8, ``${weight_bits:w4a8}`` -> 4, ``${activation_bits:w4a8}`` -> 8,
``${start_time:}`` -> 20260131-235959-123456, different for every job of a process, ``${model_data:wan}`` -> clips, the data
that the model's recipe names, ``${micro_batches:64,8,1,1}`` -> 8, so many of 1 sample on each of 8 devices of 1 node are 64,
``${launched_nodes:}`` -> 1, nodes that another launcher started,
``${chosen:init}`` -> mse, the file that was chosen from the group, ``${chosen_targets:}`` -> [comfy], those of ``export=``.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from qvgen.config.bits import Bits
from qvgen.config.leaf_file import leaf_content, leaf_names, leaf_target
from qvgen.config.processes.device_choice import Batch, choose_devices
from qvgen.config.processes.launched_world import launched_nodes
from qvgen.config.run_exports import chosen_targets

_last_start = datetime.min


def _start_time() -> str:
    """The present, to the microsecond, and never the same twice in a process."""
    global _last_start
    _last_start = max(datetime.now(), _last_start + timedelta(microseconds=1))
    return _last_start.strftime("%Y%m%d-%H%M%S-%f")


def _model_data(model: str) -> str:
    """The file of conf/data that a model is trained on unless another one is chosen."""
    spec = OmegaConf.create(leaf_content("model", model)) if model in leaf_names("model") else OmegaConf.create()
    return str(OmegaConf.select(spec, "recipe.data", default="clips"))


def _chosen(group: str, *, _root_: DictConfig) -> str | None:
    """A section's name in paths and reports: the file that was chosen, or the class where another than its own is named."""
    choice = HydraConfig.get().runtime.choices.get(group)
    target = OmegaConf.select(_root_, f"{group}._target_", default=None)
    if choice is None or target is None or target == leaf_target(group, str(choice)):
        return None if choice is None else str(choice)
    return str(target).rpartition(".")[2]


def _micro_batches(batch_size: Any, devices: Any, nodes: Any, size: Any, context: Any = 1) -> int:
    """Micro-batches of a device per optimizer step; 1 where nothing says how large they may be, or they don't divide."""
    if size is None:
        return 1
    if not isinstance(devices, int):  # shown as it is written (--cfg job --resolve); a run has settled it before
        batch = Batch(size=int(batch_size), parts=int(nodes))
        devices = choose_devices(devices, batch=lambda: batch, alone=lambda: None).number
    groups = max(1, int(devices) * int(nodes) // int(context))  # with samples of their own
    return max(1, int(batch_size) // (groups * int(size)))


def _chosen_targets() -> list[str] | None:
    """The targets of ``export=``, which may be a list: hydra notes of a group only one choice."""
    return list(chosen_targets(HydraConfig.get().overrides.task)) or None


_RESOLVERS: dict[str, Callable[..., Any]] = {
    "bits_label": lambda bits: Bits.parse(bits).label,
    "weight_bits": lambda bits: Bits.parse(bits).weight,
    "activation_bits": lambda bits: Bits.parse(bits).activation,
    "start_time": _start_time,
    "model_data": _model_data,
    "chosen": _chosen,
    "micro_batches": _micro_batches,
    "launched_nodes": launched_nodes,
    "chosen_targets": _chosen_targets,
}


def register_resolvers() -> None:
    """Make the resolvers of conf/ known."""
    for name, resolver in _RESOLVERS.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
