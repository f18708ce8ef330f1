"""The metrics of a suite that one video has beside the full-precision model's, measured while a model is trained.

The metrics are those of `qvgen evaluate` (conf/metric). Left out are metrics of whole sets and of the models, those that
compare nothing, and those whose network is not there; what is left out is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch

from qvgen.config.leaves import load_leaf
from qvgen.data.video import Frames
from qvgen.errors import UserError
from qvgen.evaluation.metrics.base import VideoMetric
from qvgen.evaluation.suite.case import Case
from qvgen.evaluation.suite.measuring import measure_case

log = logging.getLogger(__name__)


class PairedMetrics:
    """The metrics of one suite.

    Args:
        suite: Name of a file of conf/suite; None: none.

    Attributes:
        metrics: The metrics that are measured, by name.

    Raises:
        UserError: There is no such suite or metric, or none of the suite's can be measured.
    """

    def __init__(self, suite: str | None) -> None:
        self.metrics: dict[str, VideoMetric] = {}
        if suite is None:
            return
        for name in load_leaf("suite", suite).metrics:
            metric = load_leaf("metric", name)
            if not isinstance(metric, VideoMetric) or not metric.paired:
                reason = "it does not compare single videos"
            elif (absent := metric.absent()) is not None:
                reason = absent
            else:
                self.metrics[name] = metric
                continue
            log.info("evaluation.suite=%s: %s is left out: %s", suite, name, reason)
        if not self.metrics:
            raise UserError(
                f"evaluation.suite={suite} has no metric that compares single videos here; write evaluation.suite=fast"
            )

    def measure(self, video: Frames, reference: Frames, *, caption: str) -> Mapping[str, float]:
        """The values of a video, by metric; none, with a warning, where it can't be measured: training goes on.

        Args:
            video: uint8 [F, H, W, 3].
            reference: The full-precision model's, of the same shape.
            caption: Text that both were made from.
        """
        if not self.metrics:
            return {}
        ours, theirs = (torch.from_numpy(np.ascontiguousarray(frames)) for frames in (video, reference))
        case = Case(name=repr(caption), prompt=0, seed=None, caption=caption)
        try:
            values: Mapping[str, float] = measure_case(self.metrics, case, video=ours, reference=theirs)["values"]
        except (
            ValueError
        ) as error:  # a video of one frame, a value that is not finite: no reason to lose a training for
            log.warning("the suite's metrics of a validation video are left out: %s", error)
            return {}
        return values
