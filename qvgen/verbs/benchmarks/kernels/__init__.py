"""The benchmark ``kernels``: packed linears beside torch's own and those of other libraries, interleaved in one process."""

from qvgen.config.verb_schema import BenchmarkConfig
from qvgen.verbs.benchmarks.base import Benchmark, cpu_kernel
from qvgen.verbs.benchmarks.kernels.page import kernel_table, plot
from qvgen.verbs.benchmarks.kernels.rows import kernel_rows

__all__ = ["BENCHMARK"]


def _describe(config: BenchmarkConfig) -> str:
    """What would be measured."""
    return f"kernels: shapes {', '.join(config.shapes)} on {list(config.threads)} threads"


def _subject(_: BenchmarkConfig) -> str:
    """The kernel that this processor runs."""
    return f"cpu-{cpu_kernel()}"


BENCHMARK = Benchmark(
    rows=kernel_rows,
    table=kernel_table,
    describe=_describe,
    subject=_subject,
    group=("shape",),
    several_rows=True,
    plot=plot,
)
