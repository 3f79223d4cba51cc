"""Memory that is kept: when a process asks for as much again, it gets no pages from the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

TWICE = """
import resource, sys, torch
from jem.device import use_cpu
if sys.argv[1] == "kept":
    use_cpu(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MB, which glibc would always give back
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
found = [faults() for _ in range(20)]
print(min(found), torch.get_num_threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's settings are glibc's")
def test_freed_memory_is_used_again():
    found = {}
    for how in ("kept", "as it is"):
        command = [sys.executable, "-c", TWICE, how]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        found[how] = [int(each) for each in out.split()]
    assert found["kept"][0] < 100 < found["as it is"][0], found
    assert found["kept"][1] == 1
