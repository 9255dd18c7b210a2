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
           such passes, spread over the run, whose gradients are thrown away, and the optimizer's time
exposed    step - compute: the communication and compression that the backward pass does not hide
sent       payload that a rank sends in a step, counted at the process group (smallreduce.metrics); the most of all
loss       nats per byte on fixed validation windows after the last step
#wrong     parameters, over all ranks, whose bits differ from rank 0's after the last step
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import smallreduce as sr
from measurement import REPOSITORY, Spread, differing_parameters, save, table
from smallreduce import metrics

sys.path.insert(0, str(REPOSITORY / "examples"))
from train_gpt import GPT, GPTConfig, batches, evaluate, learning_rate, load_corpus

ONE_BUCKET_MB = 100_000
METHODS = ("ddp", "fp16", "powersgd-1", "powersgd-4", "int8", "int4", "int4-hadamard", "sign")


@dataclass(frozen=True)
class Run:
    """One method with one seed; see the module's text."""

    method: str
    seed: int
    steps: int
    world_size: int
    parameters: int
    step_seconds: Spread
    compute_seconds: Spread
    exposed_seconds: float
    sent_nbytes_per_step: float
    validation_losses: list[tuple[int, float]]
    validation_loss: float
    wrong: int


def optimizer_of(
    method: str, ddp: DistributedDataParallel, lr: float, uncompressed_steps: int
) -> torch.optim.Optimizer:
    """The optimizer of ``method``, whose communication hook is registered with ``ddp``."""
    if method == "dgc":
        warmup = ((uncompressed_steps, 1.0),) if uncompressed_steps else ()
        return sr.optim.DGC(ddp, lr, warmup=warmup)
    install(method, ddp, uncompressed_steps)
    return torch.optim.AdamW(ddp.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


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


def slowest(seconds: list[float]) -> list[float]:
    """The largest of all ranks, element by element."""
    times = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    result: list[float] = times.tolist()
    return result


def train(method: str, seed: int, args: argparse.Namespace, corpus: tuple[Tensor, Tensor]) -> Run:
    """One run; all ranks call it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    training, validation = corpus
    torch.manual_seed(seed)
    config = GPTConfig(width=args.width, layers=args.layers, heads=max(1, args.width // 32), context=args.context)
    model = GPT(config)
    # With several buckets in flight on gloo torch's powerSGD_hook was seen to abort with mismatched sizes; it issues
    # later collectives from callbacks, whose order may differ between ranks. One bucket costs it the overlap.
    bucket_cap_mb = ONE_BUCKET_MB if method.startswith("powersgd-") else None
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    optimizer = optimizer_of(method, ddp, args.lr, args.uncompressed_steps)
    generator = torch.Generator().manual_seed(seed * world_size + rank)
    sampler = batches(training, batch=args.batch, context=args.context, generator=generator)

    def backward(tokens: Tensor, targets: Tensor) -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        ddp(tokens, targets).backward()
        return time.perf_counter() - start

    def update() -> float:
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start

    compute_every = max(1, (args.steps - args.warmup_steps) // args.compute_steps)
    seconds: list[float] = []
    compute: list[float] = []
    losses: list[tuple[int, float]] = []
    sent_nbytes = 0

    def validate(step_number: int) -> None:
        loss = torch.zeros(1, dtype=torch.float64)
        if rank == 0:
            loss[0] = evaluate(model, validation, context=args.context)
        dist.broadcast(loss, src=0)
        losses.append((step_number, float(loss)))

    for number in range(args.steps):
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(number, args.steps, args.lr)
        batch = next(sampler)
        metrics.reset()
        backward_seconds = backward(*batch)
        update_seconds = update()
        seconds.append(backward_seconds + update_seconds)
        if number >= args.warmup_steps:
            sent_nbytes += metrics.bytes_sent()
            if (number - args.warmup_steps) % compute_every == 0:
                dist.barrier()
                with ddp.no_sync():
                    compute.append(backward(*batch) + update_seconds)
        if (number + 1) % args.eval_every == 0 or number + 1 == args.steps:
            validate(number + 1)
    timed = slowest(seconds)[args.warmup_steps :]
    most_sent = torch.tensor(sent_nbytes)
    dist.all_reduce(most_sent, dist.ReduceOp.MAX)
    wrong = differing_parameters(model)
    step_seconds, compute_seconds = Spread.of(timed), Spread.of(slowest(compute))
    return Run(
        method=method,
        seed=seed,
        steps=args.steps,
        world_size=world_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        step_seconds=step_seconds,
        compute_seconds=compute_seconds,
        exposed_seconds=step_seconds.median - compute_seconds.median,
        sent_nbytes_per_step=int(most_sent) / len(timed),
        validation_losses=losses,
        validation_loss=losses[-1][1],
        wrong=wrong,
    )


def format_runs(runs: Sequence[Run]) -> str:
    """One line for each method: times are medians over its seeds, the loss is their mean, the extremes beside it."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    plain = by_method.get("ddp")
    plain_seconds = statistics.median(run.step_seconds.median for run in plain) if plain else None
    plain_loss = statistics.mean(run.validation_loss for run in plain) if plain else None
    plain_sent = plain[0].sent_nbytes_per_step if plain else None
    header = [
        "method", "step ms", "spread", "compute ms", "exposed ms", "speed-up", "sent MB", "ratio", "loss", "of seeds",
        "against ddp", "#wrong",
    ]  # fmt: skip
    cells = []
    for method, of_seeds in by_method.items():
        seconds = statistics.median(run.step_seconds.median for run in of_seeds)
        sent = statistics.mean(run.sent_nbytes_per_step for run in of_seeds)
        losses = [run.validation_loss for run in of_seeds]
        loss = statistics.mean(losses)
        cells.append(
            [
                method,
                f"{1e3 * seconds:.0f}",
                f"{1e3 * min(run.step_seconds.low for run in of_seeds):.0f}-"
                f"{1e3 * max(run.step_seconds.high for run in of_seeds):.0f}",
                f"{1e3 * statistics.median(run.compute_seconds.median for run in of_seeds):.0f}",
                f"{1e3 * statistics.median(run.exposed_seconds for run in of_seeds):.0f}",
                f"{plain_seconds / seconds:.2f}" if plain_seconds else "",
                f"{sent / 1e6:.3f}",
                f"{plain_sent / sent:.2f}" if plain_sent else "",
                f"{loss:.4f}",
                f"{min(losses):.4f}-{max(losses):.4f}",
                f"{loss / plain_loss - 1:+.2%}" if plain_loss else "",
                str(sum(run.wrong for run in of_seeds)),
            ]
        )
    return table(header, cells)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup-steps", type=int, default=5, help="left out of times and bytes")
    parser.add_argument("--uncompressed-steps", type=int, default=0, help="first steps of PowerSGD and the codecs")
    parser.add_argument("--compute-steps", type=int, default=10, help="to measure the step without communication")
    parser.add_argument("--eval-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="sequences per rank and step")
    parser.add_argument("--context", type=int, default=128, help="bytes per sequence")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.steps <= args.warmup_steps:
        parser.error("--steps must be more than --warmup-steps")
    least = 2 if any(method.startswith("powersgd-") for method in args.methods) else 0
    if not 0 <= max(least, args.uncompressed_steps) <= args.warmup_steps:
        parser.error(
            f"--warmup-steps must be at least {least} and --uncompressed-steps, so that times and bytes are of one kind"
        )
    if args.compute_steps < 1:
        parser.error("--compute-steps is at least 1")
    return args


def main() -> None:
    args = parse_arguments()
    dist.init_process_group(metrics.register_counting_backend())
    rank = dist.get_rank()
    corpus = load_corpus()
    runs: list[Run] = []
    for seed in args.seeds:
        for method in args.methods:
            runs.append(train(method, seed, args, corpus))
            if rank == 0:
                print(f"seed {seed}, {method}: loss {runs[-1].validation_loss:.4f}", file=sys.stderr, flush=True)
    if rank == 0:
        parameters = runs[0].parameters
        print(f"{dist.get_world_size()} ranks, {parameters} parameters, {args.steps} steps\n{format_runs(runs)}")
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        save(args.json, "training", runs, settings=settings)
    wrong = sum(run.wrong for run in runs)
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        sys.exit(f"{wrong} parameters differ between ranks")


if __name__ == "__main__":
    main()
