"""A launcher as anyone could write it: it runs the jobs of a sweep in the reverse order, and leaves the one it is told to."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

OPTIONS = {"_target_": "hydra_plugins.backwards.launcher.Backwards", "leave": -1}
"""What ``hydra.launcher.*`` can say: ``leave`` is the number of a job that is not run, -1 for none."""

ConfigStore.instance().store(group="hydra/launcher", name="backwards", node=OPTIONS, provider="tests")


class Backwards(Launcher):
    """See this module."""

    def __init__(self, leave: int) -> None:
        self.leave = leave

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what a job is run with."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the last job first."""
        done: list[JobReturn] = []
        for index in reversed(range(len(job_overrides))):
            if index == self.leave:
                done.append(done[0])
                continue
            job = self.hydra_context.config_loader.load_sweep_config(self.config, list(job_overrides[index]))
            with open_dict(job):
                job.hydra.job.id = job.hydra.job.num = initial_job_idx + index
            done.append(
                run_job(
                    hydra_context=self.hydra_context,
                    task_function=self.task_function,
                    config=job,
                    job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir",
                )
            )
        return done[::-1]
