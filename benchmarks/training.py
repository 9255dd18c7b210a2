"""Training a small GPT with compressed gradients against what torch itself offers: step time, bytes and loss.

    torchrun --nproc-per-node 2 benchmarks/training.py --steps 300 --seeds 0 1 2                 # losses
    python benchmarks/slow_network.py --ranks 4 --rate 1gbit -- python benchmarks/training.py    # times

The model, the corpus and the schedule are those of ``examples/train_gpt.py``; every method starts from the same
parameters and sees the same batches. Methods: ``ddp`` (DistributedDataParallel as it is), ``fp16`` (torch's
fp16_compress_hook), ``powersgd-R`` (torch's powerSGD_hook of rank R, with its error feedback and warm start, and all
gradients in one bucket), any codec of smallreduce (``int4``, ``sign``, ...) with error feedback, all with AdamW, and
``dgc``, which is an optimizer itself (smallreduce.optim.DGC: SGD with momentum that sends 0.1 %); what that learns is
for ``convergence.py`` to compare. PowerSGD, the codecs and DGC leave the first ``--uncompressed-steps`` as they are
(PowerSGD at least two, without which it has no feedback). For each method it reports

step       seconds of a training step, the slowest rank's, median and spread over the steps after ``--warmup-steps``
compute    the same with the backward pass under ``no_sync()``, where nothing is compressed or sent: ``--compute-steps``
           such passes after the last step, whose gradients are thrown away, and the median of the optimizer's times
exposed    step - compute: the communication and compression that the backward pass does not hide
sent       payload that a rank sends in a step, counted at the process group (smallreduce.metrics); the most of all
link       what a node's network device sends in a step, headers and all, under slow_network.py; the most of all
loss       nats per byte on fixed validation windows after the last step
#wrong     parameters, over all ranks, whose bits differ from rank 0's after the last step

A long comparison can be made in pieces: with ``--at-most N`` the runs that ``--json`` already holds are kept, at most N
are added, and the file is written after each. ``sharded.py`` does the same for the sharded methods.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import smallreduce as sr
from comparison import ADAMW, Batch, Trained, backward_seconds, check_arguments, format_runs, make_parser, run_all
from train_gpt import GPT  # comparison.py has put its folder on the path

ONE_BUCKET_MB = 100_000
METHODS = ("ddp", "fp16", "powersgd-1", "powersgd-4", "int8", "int4", "int4-hadamard", "sign")


def prepare(method: str, model: GPT, args: argparse.Namespace) -> Trained:
    """Makes ``model`` one that ``method`` trains; all ranks call it."""
    # With several buckets in flight on gloo torch's powerSGD_hook was seen to abort with mismatched sizes; it issues
    # later collectives from callbacks, whose order may differ between ranks. One bucket costs it the overlap.
    bucket_cap_mb = ONE_BUCKET_MB if method.startswith("powersgd-") else None
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    optimizer: torch.optim.Optimizer
    if method == "dgc":
        warmup = ((args.uncompressed_steps, 1.0),) if args.uncompressed_steps else ()
        optimizer = sr.optim.DGC(ddp, args.lr, warmup=warmup)
    else:
        install(method, ddp, args.uncompressed_steps)
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=args.lr, **ADAMW)

    def compute(batch: Batch, update: float) -> float:
        with ddp.no_sync():
            return backward_seconds(ddp, optimizer, batch) + update

    return Trained(ddp, optimizer, compute)


def install(method: str, ddp: DistributedDataParallel, uncompressed_steps: int) -> None:
    """Registers the communication hook of ``method`` with ``ddp``."""
    if method == "ddp":
        return
    if method == "fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif method.startswith("powersgd-"):
        state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=int(method.removeprefix("powersgd-")),
            start_powerSGD_iter=max(2, uncompressed_steps),  # 2 is the least that it takes with error feedback
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    else:
        sr.ddp.register(ddp, method, warmup_steps=uncompressed_steps)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, METHODS)
    parser.add_argument("--uncompressed-steps", type=int, default=0, help="first steps of PowerSGD and the codecs")
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    least = 2 if any(method.startswith("powersgd-") for method in args.methods) else 0
    if not 0 <= max(least, args.uncompressed_steps) <= args.warmup_steps:
        parser.error(
            f"--warmup-steps must be at least {least} and --uncompressed-steps, so that times and bytes are of one kind"
        )
    return args


if __name__ == "__main__":
    run_all("training", parse_arguments(), prepare, format_runs)
