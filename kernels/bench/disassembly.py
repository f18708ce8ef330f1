"""Machine code of a compiled Triton kernel, by the tools that lie in Triton's wheel."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton


def disassembled(found):
    """Instructions as (address, text), and (registers, bytes of stack) of a thread."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        outputs = [
            subprocess.run([tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        ]
    lines = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?) ?;", outputs[0])]
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", outputs[1]).groups())
    return lines, registers, stack
