"""Build hook: QVGEN_BUILD_KERNELS=1 compiles the CPU kernels at install time and puts the library into the wheel.

Without it the wheel is pure Python with sources and the library is built at first use (kernels/qvgen_kernels/cpu_build.py).
With it the wheel is for this machine's kind alone, and installing fails where there is no C++ compiler.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SETTING = "QVGEN_BUILD_KERNELS"


class KernelBuildHook(BuildHookInterface):
    """Adds the built library to the wheel where it is asked for."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Build the library, or find it in the cache, and include it.

        Raises:
            ValueError: the setting is neither 0 nor 1.
            BuildError: no compiler, or it failed.
        """
        setting = os.environ.get(SETTING, "0")
        if setting not in ("0", "1"):
            raise ValueError(
                f"{SETTING}={setting!r}; use 1 to build the CPU kernels now, or 0 to build them at first use"
            )
        if setting == "0":
            return
        source = Path(self.root) / "kernels" / "qvgen_kernels" / "cpu_build.py"
        found = importlib.util.spec_from_file_location("cpu_build", source)
        assert found is not None
        assert found.loader is not None
        cpu_build = importlib.util.module_from_spec(found)
        found.loader.exec_module(cpu_build)
        library = cpu_build.library_path()
        for file in (library, cpu_build.checksum_path(library)):
            build_data["force_include"][str(file)] = f"qvgen_kernels/prebuilt/{file.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"


def _platform_tag() -> str:
    from packaging.tags import sys_tags

    return next(tag.platform for tag in sys_tags())
