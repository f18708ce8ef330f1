"""``strategy=auto`` of a training, settled by its plan: what the run's folder, its other processes and its plan then say."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from qvgen.config.processes import visible_gpus
from qvgen.config.schema.train import TrainConfig
from qvgen.errors import DOES_NOT_FIT, UnfitEnvironmentError
from qvgen.training.design.meta_model import Prepared
from qvgen.training.planning.memory import MemoryCounter, find_device
from qvgen.training.planning.strategy_choice import choose_strategy
from qvgen.training.planning.text import verdict
from qvgen.training.planning.training_plan import plan_training
from qvgen.verbs._parts import training_run

log = logging.getLogger(__name__)


def settle_strategy(
    config: TrainConfig, student: Prepared | None
) -> tuple[TrainConfig, MemoryCounter | None, int | None]:
    """A configuration whose strategy has a name.

    Args:
        config: The run's.
        student: The student without weights, where it was built already.

    Returns:
        The configuration, what was counted for it, and the exit code of a run that is to train and fits nowhere.

    Raises:
        UnfitEnvironmentError: There are GPUs that CUDA can't use: several processes would train on the CPU instead.
    """
    if config.strategy.name != "auto":
        return config, None, None
    given = config.device_memory_gib if config.dry_run else None  # which describes another device for a plan alone
    run = training_run(config)
    device = find_device(given, devices=run.node_devices)
    if run.devices > 1 and not device.on_gpu and (number := visible_gpus.count_gpus()) and not config.dry_run:
        raise UnfitEnvironmentError(
            f"{number} GPUs are visible, and torch can't use them here (qvgen doctor says more); "
            f"hide them to train on the CPU: {visible_gpus.VARIABLE}="
        )
    choice = choose_strategy(run, device, student=student)
    log.info(choice.line)
    plain = {**config.plain, "strategy": {**config.plain["strategy"], "name": choice.strategy.name}}
    config = replace(config, strategy=choice.strategy, plain=plain)
    if choice.fits or config.dry_run:
        return config, choice.counter, None
    plan = plan_training(
        replace(run, strategy=choice.strategy), run_dir=Path(config.run_dir), student=student, counter=choice.counter
    )
    for line in verdict(plan):
        print(line)
    log.info("write strategy=%s to try it all the same", choice.strategy.name)
    return config, choice.counter, DOES_NOT_FIT
