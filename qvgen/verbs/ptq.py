"""Make a low-bit model by a PTQ method alone: calibration if it needs any, fold, pack, check, videos, report."""

from __future__ import annotations

from qvgen.config.schema import TrainConfig
from qvgen.training.session import TRAINING_THREADS, use_threads
from qvgen.training.student import check_student
from qvgen.verbs.train import quantize


def run(config: TrainConfig) -> None:
    """Do what `qvgen train` does, without its training."""
    if config.method.name != "ptq" or config.steps:
        raise ValueError(
            f"method={config.names.method} steps={config.steps}: qvgen ptq trains nothing; use qvgen train"
        )
    use_threads(TRAINING_THREADS)
    config.data.check(config.model)
    check_student(config)
    if config.dry_run:
        for line in plan(config):
            print(line)
        return
    quantize(config)


def plan(config: TrainConfig) -> list[str]:
    """What the verb would do."""
    needs = ", ".join(sorted(config.init.needs))
    calibration = config.calibration
    return [
        f"model={config.names.model} init={config.names.init} {config.profile.label} ({config.profile.name}), no training",
        f"calibration: {needs} from {calibration.videos} videos of {calibration.steps} steps"
        if needs
        else "calibration: none, the method is data-free",
        f"output: {config.run_dir}",
    ]
