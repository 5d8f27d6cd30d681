"""OpenMP threads sleep while other processes need the cores."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from app.runtime.wait_policy import BUSY_SHARE, WaitMeter, adaptive_wait_policy

ROOT = Path(__file__).parents[3]
SCRIPT = """
import os, threading, time
import torch
from app.runtime import wait_policy

wait_policy.CHECK_SECONDS = 0.01
wait_policy.SLEEP_SECONDS = 0.1
share = 1.0
wait_policy.WaitMeter.share = lambda self: share
ones = torch.ones(2**17)  # enough for two threads
ones.add_(1)
tasks = wait_policy.TASKS
workers = [task for task in tasks.iterdir() if task.name != str(os.getpid())]

def sleeps():
    # How often the threads of OpenMP have slept in the milliseconds between 50 operations.
    before = count_sleeps()
    for _ in range(50):
        ones.add_(1)
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
    return count_sleeps() - before

def count_sleeps():
    texts = [(worker / "status").read_text() for worker in workers]
    return sum(int(text.split("voluntary_ctxt_switches:")[1].split()[0]) for text in texts)

def wait_for_threads(count):
    deadline = time.monotonic() + 60
    while len(list(tasks.iterdir())) != count:
        assert time.monotonic() < deadline, list(tasks.iterdir())
        time.sleep(0.01)

count = 1 + len(workers)
free = sleeps()
with wait_policy.adaptive_wait_policy() as adapts:
    if adapts:
        wait_for_threads(count + 2 + len(os.sched_getaffinity(0)))
    busy = sleeps()
    share = 0.0
    wait_for_threads(count + adapts)
    quiet = sleeps()
wait_for_threads(count)
print(adapts, free, busy, quiet)
"""
needs_libgomp = pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="needs statistics of Linux's scheduler"
)


@needs_libgomp
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core is always shared")
def test_waiting_threads_sleep_only_while_the_machine_is_busy() -> None:
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    inherited = {key: value for key, value in os.environ.items() if key not in unset}
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=inherited | {"OMP_NUM_THREADS": "2"},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    adapts, free, busy, quiet = answer.stdout.split()
    assert adapts == "True"
    assert 2 * max(int(free), int(quiet)) < int(busy)  # other tests may run at the same time
    assert int(busy) > 40


@needs_libgomp
def test_threads_that_share_a_core_are_seen_to_wait() -> None:
    core, done = min(os.sched_getaffinity(0)), threading.Event()

    def work() -> None:
        os.sched_setaffinity(0, {core})  # of this thread
        while not done.is_set():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000)

    meter = WaitMeter()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        shares = (meter.share() for _ in range(300) if not done.wait(0.1))
        assert any(share > BUSY_SHARE for share in shares)
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_policy_that_the_user_has_set_is_left_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "")
    with adaptive_wait_policy() as adapts:
        assert not adapts


def test_single_thread_has_no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with adaptive_wait_policy() as adapts:
        assert not adapts
