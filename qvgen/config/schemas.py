"""The verbs and their configurations: the one list that all others ask."""

from __future__ import annotations

from qvgen.config.evaluate_schema import EvaluateConfig
from qvgen.config.export_schema import ExportConfig
from qvgen.config.import_schema import ImportConfig
from qvgen.config.machine_schema import AssetsConfig, DoctorConfig
from qvgen.config.presentation_schema import DashboardConfig, ReportCardConfig
from qvgen.config.schema import FoldConfig, TrainConfig
from qvgen.config.verb_schema import (
    BenchmarkConfig,
    CompareConfig,
    GenerateConfig,
    InspectConfig,
    PrecomputeConfig,
)

VerbConfig = (
    AssetsConfig
    | BenchmarkConfig
    | CompareConfig
    | DashboardConfig
    | DoctorConfig
    | EvaluateConfig
    | ExportConfig
    | ImportConfig
    | TrainConfig
    | FoldConfig
    | GenerateConfig
    | InspectConfig
    | PrecomputeConfig
    | ReportCardConfig
)
SCHEMAS: dict[str, type[VerbConfig]] = {
    "assets": AssetsConfig,
    "benchmark": BenchmarkConfig,
    "compare": CompareConfig,
    "dashboard": DashboardConfig,
    "doctor": DoctorConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "import": ImportConfig,
    "train": TrainConfig,
    "fold": FoldConfig,
    "generate": GenerateConfig,
    "inspect": InspectConfig,
    "precompute": PrecomputeConfig,
    "ptq": TrainConfig,
    "report-card": ReportCardConfig,
}
"""Verb -> what its ``run`` receives."""
