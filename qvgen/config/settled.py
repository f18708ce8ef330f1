"""``auto`` in a composed configuration, replaced by what it means here, before anything is worked out from it.

``devices`` becomes a number, from which ``accumulate`` follows. ``strategy`` becomes ``single`` where there is one process,
and what the run began with where it goes on with as many; else its plan decides, when the models are known
(docs/distributed.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qvgen.config.leaf_class import find_class
from qvgen.config.processes.device_choice import AUTO, Batch, DeviceChoice, choose_devices, choose_shares
from qvgen.config.run_config import read_config
from qvgen.config.schema.memory_rules import one_process_reason
from qvgen.config.schema.strategy import STRATEGIES
from qvgen.errors import OWN_PACKAGES, UserError


def settle_(config: DictConfig) -> DeviceChoice | None:
    """Replace ``auto``, and a list of GPUs, in place.

    Returns:
        The processes; None for a verb that neither trains nor shares out clips or videos.

    Raises:
        UserError: ``devices`` can't be read.
    """
    if "num_shards" in config or "context_parallel" in config:
        choice = choose_shares(config.devices, is_shard=config.get("num_shards", 1) != 1)
        OmegaConf.update(config, "devices", choice.number)
        return choice
    if "devices" not in config or "strategy" not in config:
        return None
    begun = _begun(config)
    number = begun.get("devices")
    choice = choose_devices(
        config.devices,
        batch=lambda: _batch(config),
        began=number if isinstance(number, int) and number > 0 else None,
        alone=lambda: _alone(config),
    )
    OmegaConf.update(config, "devices", choice.number)
    if config.strategy.name == AUTO:
        name = begun.get("strategy", {}).get("name")
        if name in STRATEGIES and choice.number == number:
            config.strategy.name = name
        elif choice.number == 1 and config.num_nodes == 1:
            config.strategy.name = "single"
    return choice


def _begun(config: DictConfig) -> Mapping[str, Any]:
    """The configuration of the run that goes on; empty where one begins."""
    if not config.resume:
        return {}
    try:
        return read_config(Path(str(config.run_dir)))
    except UserError:
        return {}


def _batch(config: DictConfig) -> Batch:
    try:
        accumulate = 1 if OmegaConf.is_interpolation(config, "accumulate") else int(config.accumulate)
        return Batch(size=int(config.batch_size), parts=max(1, accumulate * int(config.num_nodes)))
    except (OmegaConfBaseException, TypeError, ValueError):
        return Batch(size=1)  # it is said what is wrong with the key itself when it is read


def _alone(config: DictConfig) -> str | None:
    """Why the run can only be one process."""
    if config.strategy.name == "single":
        return "strategy=single is one process"
    target = str(config.method.get("_target_"))
    is_ours = target.partition(".")[0] in OWN_PACKAGES
    if is_ours and getattr(find_class(target, key="method", is_users=False), "trains", None) == "autoencoder":
        return f"{target.rpartition('.')[2]} trains in one process"
    return one_process_reason(gradients=config.optim.gradients, masters=config.optim.masters)
