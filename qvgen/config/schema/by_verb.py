"""The verbs and their configurations: the one list that all others ask."""

from __future__ import annotations

from qvgen.config.schema.evaluate import EvaluateConfig
from qvgen.config.schema.export import ExportConfig
from qvgen.config.schema.imports import ImportConfig
from qvgen.config.schema.machine import AssetsConfig, DoctorConfig
from qvgen.config.schema.presentation import DashboardConfig, ReportCardConfig
from qvgen.config.schema.train import FoldConfig, TrainConfig
from qvgen.config.schema.verbs import (
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
