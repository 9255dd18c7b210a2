"""Peak memory of a rank with each of the sharded methods: computed, and measured.

    python benchmarks/memory.py --ranks 4 --node-size 2
    python benchmarks/memory.py --ranks 2 --methods ddp fsdp2 --width 256

The methods are those of ``sharded.py``. Each runs in processes of its own, which torchrun starts, and which first train
a tiny model in the same way, so that libraries, threads and connections are there before anything is counted. Then

computed   bytes that last from step to step: the formulae of :func:`lasting`
measured   the largest resident set of the process in the steps after ``--warmup-steps`` (``VmHWM``, reset before them),
           less what it was before the model was made; the largest of all ranks
rest       measured - computed: what a step needs for a while, as activations, a unit's gathered weights and unsharded
           gradients; packets; connections

The C library's allocator is told to take tensors from the system and to give them back one by one, so that the resident
set is what is in use. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import smallreduce as sr
from comparison import backward_seconds, model_of, update_seconds
from measurement import save, table
from sharded import FSDP2S, KEEP, METHODS, RAGGEDS, SDP4BITS, prepare
from train_gpt import batches, load_corpus  # comparison.py has put its folder on the path

DEFAULT_METHODS = (
    "ddp", "ddp-int4", "zero", "fsdp2", "fsdp2-keep", "fsdp2-int4", "fsdp2-two-level", "fsdp2-packets",
    "fsdp2-differences", "fsdp2-int4-loco", "ragged", "ragged-int4", "ragged-adam8bit", "sdp4bit-exact", "sdp4bit",
)  # fmt: skip
LOCO_BITS = sr.IntQuant(8).bits_per_element  # of an element's residual with feedback="int8"
# Tensors of a page and more are mapped one by one, and what the heap has left over goes back.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "4096", "MALLOC_MMAP_MAX_": "1000000"}


@dataclass(frozen=True)
class Lasting:
    """Bytes that a rank holds from step to step. ``gradients`` includes DDP's buckets; ``kept`` is what compression
    keeps beside residuals: packets that belong to a bucket, and copies of the weights."""

    weights: int
    gradients: int
    optimizer: int
    feedback: int
    kept: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.feedback + self.kept


@dataclass(frozen=True)
class Row:
    """One method; see the module's text. All in bytes."""

    method: str
    world_size: int
    parameters: int
    weights_nbytes: int
    gradients_nbytes: int
    optimizer_nbytes: int
    feedback_nbytes: int
    kept_nbytes: int
    computed_nbytes: int
    measured_nbytes: int


def lasting(method: str, parameters: int, world_size: int, nodes: int = 1) -> Lasting:
    """What ``method`` holds of a model of ``parameters`` fp32 elements, trained by AdamW with two moments."""
    whole, part = 4 * parameters, 4 * parameters // world_size
    if method == "ddp":
        return Lasting(whole, 2 * whole, 2 * whole, 0)
    if method == "ddp-int4":  # all of the parameters, though those of one dimension are not compressed
        return Lasting(whole, 2 * whole, 2 * whole, whole + part, 2 * packets_nbytes("int4", parameters))
    if method == "zero":
        return Lasting(whole, 2 * whole, 2 * part, 0)
    if method in SDP4BITS:
        sdp4bit = SDP4BITS[method]
        # The master of the rank's part is a copy where the weights that all hold are another thing. Exact gradients are
        # reduced whole, on the CPU.
        master = 0 if sdp4bit.weights is None else part
        kept = 0 if sdp4bit.weights is None else packets_nbytes(sdp4bit.weights, parameters)
        if sdp4bit.gradients is not None:
            # Sent and received; on two levels what is received is read as if it began with each node's in turn.
            sent = packets_nbytes(sdp4bit.gradients[nodes == world_size], parameters)
            kept += 2 * sent if nodes in (1, world_size) else sent * (2 * world_size + nodes - 1) // world_size
        return Lasting(whole + master, whole if sdp4bit.gradients is None else part, 2 * part, 0, kept)
    if method.removesuffix(KEEP) in RAGGEDS:
        ragged = RAGGEDS[method.removesuffix(KEEP)]
        moments = 2 * part if ragged.optimizer is torch.optim.AdamW else 2 * (part // 4) + 8 * part // 4096
        return Lasting(part, part, moments, 0 if ragged.feedback is None else int(LOCO_BITS / 8 * parameters))
    told = FSDP2S[method.removesuffix(KEEP)]
    residuals = {None: 0, "int8": LOCO_BITS / 8, "full": 4}[told.feedback]
    kept = packets_nbytes("int8", parameters) if told.keep_packets else 0
    if told.differences:
        kept = whole + part  # what all ranks have, and of which weights of the rank's own that is
    return Lasting(part, part, 2 * part, int(residuals * parameters), kept)


def packets_nbytes(spelling: str, parameters: int) -> int:
    """Of all parameters, headers not counted."""
    codec = sr.codec(spelling)
    assert codec is not None
    return int(parameters * codec.bits_per_element / 8)


def status_nbytes(name: str) -> int:
    """A figure of /proc/self/status: ``VmRSS``, or its peak ``VmHWM``."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {name}: only Linux tells a process how much memory it uses")
    return 1024 * int(match[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def train(method: str, args: argparse.Namespace, text: Tensor) -> tuple[int, int]:
    """Some steps of ``method``; all ranks call it. Returns the model's number of parameters and the peak, in bytes, of
    the resident set."""
    torch.manual_seed(0)
    model = model_of(args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = prepare(method, model, args)
    generator = torch.Generator().manual_seed(dist.get_rank())
    sampler = batches(text, batch=args.batch, context=args.context, generator=generator)
    for number in range(args.steps):
        if number == args.warmup_steps:
            reset_peak()
        backward_seconds(trained.module, trained.optimizer, next(sampler))
        update_seconds(trained.optimizer)
    trained.settle()
    return parameters, status_nbytes("VmHWM")


def measure(method: str, args: argparse.Namespace) -> Row:
    """One line of the table; all ranks call it, in processes that have done nothing else."""
    text, _ = load_corpus()
    train(method, argparse.Namespace(**{**vars(args), "width": 32, "layers": 1}), text)
    gc.collect()
    dist.barrier()
    before = status_nbytes("VmRSS")
    parameters, peak = train(method, args, text)
    most = torch.tensor(peak - before)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    world_size = dist.get_world_size()
    held = lasting(method, parameters, world_size, world_size // (args.node_size or world_size))
    return Row(
        method=method,
        world_size=world_size,
        parameters=parameters,
        weights_nbytes=held.weights,
        gradients_nbytes=held.gradients,
        optimizer_nbytes=held.optimizer,
        feedback_nbytes=held.feedback,
        kept_nbytes=held.kept,
        computed_nbytes=held.total,
        measured_nbytes=int(most),
    )


def launch(method: str, arguments: Sequence[str], ranks: int) -> Row:
    """:func:`measure` in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        subprocess.run(
            [*torchrun, __file__, *arguments, "--measure", method, "--json", str(path)],
            check=True,
            env={"OMP_NUM_THREADS": "1", **os.environ, **ALLOCATOR},
        )
        return Row(**json.loads(path.read_text()))


def format_rows(rows: Sequence[Row]) -> str:
    header = [
        "method",
        "weights",
        "gradients",
        "optimizer",
        "feedback",
        "kept",
        "computed MB",
        "measured MB",
        "rest MB",
    ]
    cells = [
        [
            row.method,
            *(
                f"{nbytes / 1e6:.1f}"
                for nbytes in (
                    row.weights_nbytes,
                    row.gradients_nbytes,
                    row.optimizer_nbytes,
                    row.feedback_nbytes,
                    row.kept_nbytes,
                    row.computed_nbytes,
                    row.measured_nbytes,
                    row.measured_nbytes - row.computed_nbytes,
                )
            ),
        ]
        for row in rows
    ]
    return table(header, cells)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--node-size", type=int, help="ranks of a node; default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS, metavar="METHOD")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup-steps", type=int, default=3, help="before the peak is taken")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1, help="sequences per rank and step")
    parser.add_argument("--context", type=int, default=32, help="bytes per sequence")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--measure", metavar="METHOD", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if not 0 < args.warmup_steps < args.steps:
        parser.error("--warmup-steps must be at least 1 and less than --steps")
    return args


def measure_as_rank(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    row = measure(args.measure, args)
    if dist.get_rank() == 0:
        args.json.write_text(json.dumps(asdict(row)))
    dist.barrier()
    dist.destroy_process_group()
    # DTensor's caches keep FSDP2's groups, and gloo's threads with them, until the interpreter ends. That is slow with
    # this allocator, and a rank was seen to abort in it ("terminate called without an active exception", torch 2.13).
    os._exit(0)


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)
    if args.measure is not None:
        measure_as_rank(args)
        return
    forwarded = [*arguments]
    if args.json is not None:
        place = forwarded.index("--json")
        del forwarded[place : place + 2]
    rows = [launch(method, forwarded, args.ranks) for method in args.methods]
    print(f"{args.ranks} ranks, {rows[0].parameters} parameters\n{format_rows(rows)}")
    save(args.json, "memory", rows, settings={name: value for name, value in vars(args).items() if name != "json"})


if __name__ == "__main__":
    main(sys.argv[1:])
