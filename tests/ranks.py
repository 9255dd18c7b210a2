"""Runs a function on several ranks: real processes, joined by a fresh gloo group for each call.

    def check(rank, world_size): ...             # at module level, so that the processes can import it

    def test_it():
        results = run(check, world_size=2)       # [what rank 0 returned, what rank 1 returned]

The processes are kept for the next call, since importing torch is what takes long. A rank that raises fails the call
with every rank's traceback; one that hangs is killed after ``timeout`` seconds.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "RanksFailed", "outcomes", "run"]

_spawn = multiprocessing.get_context("spawn")


@dataclass
class Outcome:
    """How a call ended on one rank: with ``value``, or with ``error`` (``traceback`` is its text), or, both None and
    ``ended`` False, not at all. ``exitcode`` is that of the process, None if it was kept."""

    ended: bool = False
    value: Any = None
    error: BaseException | None = None
    traceback: str = ""
    seconds: float = 0.0
    exitcode: int | None = None


class RanksFailed(AssertionError):
    """Some ranks raised, died or did not end in time; the message has what each of them left."""


def _picklable(error: BaseException) -> BaseException:
    # Only the type and the text cross over: an exception may hold what cannot be pickled.
    kind = type(error) if getattr(builtins, type(error).__name__, None) is type(error) else RuntimeError
    return kind(str(error))


def _serve(connection: Connection) -> None:
    """What a process does: one job after the other, until there are no more."""
    import torch

    faulthandler.enable()  # a crash leaves every thread's traceback
    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        path, environment, *rest = job
        sys.path[:] = path
        os.environ.update(environment)
        connection.send(_do(*connection.recv(), *rest))


def _do(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, store: str, backend: str, timeout: float
) -> Outcome:
    import torch.distributed as dist

    begin = time.monotonic()
    try:
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        try:
            return Outcome(True, function(rank, world, *args), seconds=time.monotonic() - begin)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    except BaseException as error:
        return Outcome(True, None, _picklable(error), traceback.format_exc(), time.monotonic() - begin)


class _Process:
    def __init__(self) -> None:
        self.connection, theirs = _spawn.Pipe()
        self.process = _spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def end(self, seconds: float) -> int | None:
        """Asks the process to exit; kills it if it has not within ``seconds``. Returns its exit code."""
        if self.process.is_alive():
            with contextlib.suppress(BrokenPipeError):  # it died in between; join() tells
                self.connection.send(None)
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        return self.process.exitcode


_idle: list[_Process] = []


@atexit.register
def _end_all() -> None:
    for process in _idle:
        process.end(5)


def outcomes(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "gloo",
    timeout: float = 60,
    group_timeout: float = 30,
    keep: bool = True,
    environment: dict[str, str] | None = None,
) -> list[Outcome]:
    """As :func:`run`, but returns how each rank ended, whatever happened.

    Args:
        group_timeout: Of the process group, in seconds.
        keep: Keep the processes for later calls; otherwise they are asked to exit, and the outcomes have exit codes.
    """
    processes = [_idle.pop() if _idle and keep else _Process() for _ in range(world_size)]
    with tempfile.TemporaryDirectory() as folder:
        results = _run(
            processes, function, args, str(Path(folder) / "store"), backend, timeout, group_timeout, environment
        )
        # One that failed may have left things behind.
        if keep and environment is None and all(result.ended and result.error is None for result in results):
            _idle.extend(processes)
        else:
            for process, result in zip(processes, results, strict=True):
                result.exitcode = process.end(10 if result.ended else 0)
    return results


def _run(
    processes: list[_Process],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    store: str,
    backend: str,
    timeout: float,
    group_timeout: float,
    environment: dict[str, str] | None,
) -> list[Outcome]:
    world = len(processes)
    variables = {"GLOO_SOCKET_IFNAME": "lo", **(environment or {})}
    for rank, process in enumerate(processes):
        process.connection.send((sys.path, variables, rank, world, store, backend, group_timeout))
        process.connection.send((function, args))
    results = [Outcome() for _ in processes]
    rank_of = {process.connection: rank for rank, process in enumerate(processes)}
    deadline = time.monotonic() + timeout
    while rank_of and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(rank_of), left):
            assert isinstance(connection, Connection)
            rank = rank_of.pop(connection)
            try:
                results[rank] = connection.recv()
            except EOFError:
                processes[rank].process.join()  # it died
    return results


def run(function: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> list[Any]:
    """Calls ``function(rank, world_size, *args)`` on each of ``world_size`` ranks and returns what each returned.

    The default process group is initialised before and destroyed after. ``function``, ``args`` and results are pickled.

    Args:
        **options: ``backend``, ``timeout`` and so on, as for :func:`outcomes`.

    Raises:
        RanksFailed: With every rank's traceback.
    """
    results = outcomes(function, world_size, *args, **options)
    failed = [rank for rank, result in enumerate(results) if not result.ended or result.error is not None]
    if failed:
        texts = [results[rank].traceback or f"no result, exit code {results[rank].exitcode}" for rank in failed]
        raise RanksFailed(
            "\n".join(f"rank {rank} of {world_size}: {text}" for rank, text in zip(failed, texts, strict=True))
        )
    return [result.value for result in results]
