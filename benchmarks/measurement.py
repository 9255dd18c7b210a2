"""What every benchmark shares: robust times, the description of the machine, and the file that results go into."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Spread:
    """Times of equal repetitions, in seconds: their median, and the tenth and ninetieth percentile."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), tenths[0], tenths[-1], len(seconds))


def interleaved_seconds(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Spread]:
    """Times single calls in turn, round after round, so that a change of the machine's speed meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: Spread.of(times) for name, times in seconds.items()}


def collective_seconds(
    calls: Mapping[str, Callable[[], object]], repeats: int, prepare: Callable[[], object] = lambda: None
) -> dict[str, Spread]:
    """:func:`interleaved_seconds` of collectives on the default group: each begins after a barrier, and its time is
    that of the slowest rank. Called by all ranks with the same names in the same order.

    Args:
        prepare: Called before each, and not timed.
    """
    seconds = torch.zeros(repeats + 1, len(calls), dtype=torch.float64)
    for repeat in range(repeats + 1):
        for column, call in enumerate(calls.values()):
            prepare()
            dist.barrier()
            start = time.perf_counter()
            call()
            seconds[repeat, column] = time.perf_counter() - start
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return {name: Spread.of(seconds[1:, column].tolist()) for column, name in enumerate(calls)}


def slowest(seconds: list[float]) -> list[float]:
    """The largest of all ranks, element by element."""
    times = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    result: list[float] = times.tolist()
    return result


def interface_sent_nbytes() -> int | None:
    """What the network device of slow_network.py, the node's, has sent so far; None elsewhere."""
    if "SLOW_NETWORK_RATE" not in os.environ:
        return None
    name = os.environ["GLOO_SOCKET_IFNAME"]
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        device, _, figures = line.partition(":")
        if device.strip() == name:
            return int(figures.split()[8])
    raise RuntimeError(f"/proc/self/net/dev has no device {name}")


def differing_parameters(model: torch.nn.Module) -> int:
    """Elements, over all ranks, whose bits are not those of rank 0."""
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    of_rank_0 = flat.clone()
    dist.broadcast(of_rank_0, src=0)
    count = (of_rank_0.view(torch.int32) != flat.view(torch.int32)).sum()
    dist.all_reduce(count)
    return int(count)


def _git(*arguments: str) -> str | None:
    try:
        finished = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except FileNotFoundError:
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def description() -> dict[str, Any]:
    """The machine, the versions and the commit that a result comes from."""
    import smallreduce

    # A result that is measured anew, in pieces too, is no change of what is measured.
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    script = Path(sys.argv[0]).resolve()
    arguments = list(sys.argv[1:])
    for option in ("--json", "--at-most"):  # where results go, and in how many pieces, is no part of what was measured
        if option in arguments:
            place = arguments.index(option)
            del arguments[place : place + 2]
    return {
        "command": shlex.join([script.relative_to(REPOSITORY).as_posix(), *arguments]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "smallreduce": smallreduce.build_info(),
        "threads": torch.get_num_threads(),
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        # Set by slow_network.py; None on any other network.
        "link_rate": os.environ.get("SLOW_NETWORK_RATE"),
        "ranks_per_node": os.environ.get("SLOW_NETWORK_RANKS_PER_NODE"),
    }


def save(path: Path | None, benchmark: str, rows: Sequence[Any], **extra: Any) -> None:
    """Writes dataclass ``rows`` and :func:`description` as JSON; ``path`` None: writes nothing."""
    if path is None:
        return
    document = {"benchmark": benchmark, **description(), **extra, "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns, the first aligned to the left and the others to the right."""
    widths = [max(len(cells[column]) for cells in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(cells, widths, strict=True)) for cells in [header, ["-" * w for w in widths], *rows])
    ]
    return "\n".join(line.rstrip() for line in lines)
