"""Freed memory stays with a process: page faults are counted in a process of its own, whose setting it is."""

import json
import subprocess
import sys

import pytest

from qvgen.training import freed_memory

PROGRAM = """
import ctypes, json, resource, runpy, sys
keep = runpy.run_path(sys.argv[1])["keep_freed_memory"]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults(size, times=10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        blocks = [libc.malloc(size) for _ in range(2)]
        for block in blocks:
            ctypes.memset(block, 1, size)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults(40 << 20)
answer = keep()
faults(40 << 20)  # finds the pages
print(json.dumps([answer, before, faults(40 << 20)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_pages_are_found_once():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, freed_memory.__file__], capture_output=True, text=True, check=True, timeout=60
    )
    answer, before, after = json.loads(done.stdout)
    if not answer:
        pytest.skip("another C library than glibc")
    assert before > 100
    assert after < before / 10
