"""The thread pool under fork() and under calls from several Python threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from formats.reference import FP32
from kernels.cases import CODECS, flat
from kernels.equality import (
    Case,
    PacketMemory,
    check_decode,
    check_encode,
    check_reduce_encode,
    layout_of,
)
from kernels.native import CpuKernels
from smallreduce import _C

THREADS = 4
KERNELS = CpuKernels(_C, THREADS)
# Several times the least work that is shared between threads.
CASE = Case(CODECS["int4"], FP32, "normal", flat(300_000), stochastic=True)

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()"),
    # Python warns of fork() in a process with threads: that is what is tested here.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def run_in_child(body: Callable[[], None]) -> int:
    """The exit status of a forked child that ran `body`; negative if a signal ended it, SIGALRM if it hung."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        status = 1
        try:
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def encode() -> None:
    check_encode(_C, KERNELS, CASE)


def test_the_pool_works_in_a_forked_child_and_still_in_its_parent() -> None:
    encode()  # the parent's pool has its threads
    assert run_in_child(encode) == 0
    encode()


def test_a_child_of_a_child() -> None:
    encode()

    def child() -> None:
        encode()
        assert run_in_child(encode) == 0

    assert run_in_child(child) == 0


def test_fork_while_other_threads_are_inside_kernels() -> None:
    """The child inherits a pool that is busy, and mutexes that nobody will unlock."""
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            encode()

    body = bare_encode()
    with ThreadPoolExecutor(2) as executor:
        busy = [executor.submit(keep_busy) for _ in range(2)]
        try:
            for _ in range(5):
                assert run_in_child(body) == 0
        finally:
            stop.set()
        for each in busy:
            each.result()


def bare_encode() -> Callable[[], None]:
    """An encode whose memory is all there before the fork."""
    layout = layout_of(_C, CASE)
    out = PacketMemory(layout.nbytes, 0, 0)
    buffer = CASE.buffer
    expected = CASE.encoded()

    def body() -> None:
        KERNELS.encode(buffer, FP32, layout, CASE.codec, out.bytes, out.stride)
        out.assert_holds(expected, "packet")

    return body


def test_the_interpreter_exits_with_the_pool_alive() -> None:
    """Ordinary exit, where destructors run, unlike in the forked children above."""
    program = "from kernels import test_fork; test_fork.encode()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=True)


def test_calls_from_several_python_threads() -> None:
    """Only one call at a time has the pool; the others do their work alone."""
    checks = (
        lambda seed: check_encode(_C, KERNELS, Case(CODECS["int8"], FP32, "normal", flat(200_000), seed=seed)),
        lambda seed: check_decode(_C, KERNELS, Case(CODECS["int4"], FP32, "normal", flat(200_000), seed=seed)),
        lambda seed: check_reduce_encode(
            _C, KERNELS, Case(CODECS["sign"], FP32, "normal", flat(200_000), seed=seed), 2, 0.5, with_residual=True
        ),
    )
    with ThreadPoolExecutor(8) as executor:
        futures = [executor.submit(checks[i % 3], i) for i in range(24)]
        for future in futures:
            future.result()
