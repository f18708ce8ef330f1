"""Machine code of a compiled kernel for NVIDIA's cards: its instructions, its registers, its innermost loop of products."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

__all__ = ["EMPTYING", "MATRIX", "disassembled", "inner_loop", "operation"]

MATRIX = re.compile(r"^(UTC)?[IH]G?MMA")
EMPTYING = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb\d, 0x0$")
"""A wait for every product that is under way; with 0x1 one may go on."""


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


def operation(text):
    """The operation of an instruction, without its guard."""
    return re.sub(r"^@!?U?P\w+ +", "", text).split()[0]


def inner_loop(lines):
    """Instructions of the shortest loop with matrix products; none where there is no such loop."""
    loops = []
    for end, text in lines:
        target = re.search(r"\bBRA.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < end:
            body = [own for address, own in lines if int(target[1], 16) <= address <= end]
            if any(MATRIX.match(operation(own)) for own in body):
                loops.append(body)
    return min(loops, key=len, default=[])
