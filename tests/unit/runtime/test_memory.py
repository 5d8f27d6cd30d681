"""Freed memory stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = 48 * 2**20
SCRIPT = """
import ctypes, resource, sys
from app.runtime.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def step():
    block = libc.malloc({block})
    ctypes.memset(block, 1, {block})
    libc.free(block)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""".replace("{block}", str(BLOCK))
ROOT = Path(__file__).parents[3]


def page_faults(*arguments: str, **environment: str) -> tuple[str, int]:
    """Return what `keep_freed_memory` returned, and the page faults of three steps."""
    unset = ("LD_PRELOAD", "GLIBC_TUNABLES")
    inherited = {k: v for k, v in os.environ.items() if k not in unset and "MALLOC" not in k}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    answer = subprocess.run(
        command, env=inherited | environment, cwd=ROOT, check=True, capture_output=True, text=True
    )
    kept, faults = answer.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_mapped_once() -> None:
    _, returned = page_faults("return")
    kept, faults = page_faults("keep")
    assert kept == "True"
    assert faults < returned / 5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_allocator_that_the_user_has_configured_is_left_alone() -> None:
    assert page_faults("keep", MALLOC_TOP_PAD_="0")[0] == "False"
