"""Build the 4-bit kernels of CUDA now instead of at their first use: ``python -m qvgen_kernels.cuda_int4``.

The fatbin goes into the cache where a first use looks for it, and needs no GPU to be built. Exit code 2: it can't be.
"""

from __future__ import annotations

import sys

from qvgen_kernels.cpu_build import BuildError
from qvgen_kernels.cuda_int4.build import fatbin_path


def main() -> int:
    """Build it unless it is there, and write its path."""
    try:
        sys.stdout.write(f"{fatbin_path()}\n")
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
