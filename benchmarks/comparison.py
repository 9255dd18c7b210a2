"""Trains one small GPT with several methods and compares them: what ``training.py`` and ``sharded.py`` share."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from measurement import REPOSITORY, Spread, differing_parameters, interface_sent_nbytes, save, slowest, table
from smallreduce import metrics

sys.path.insert(0, str(REPOSITORY / "examples"))
from train_gpt import GPT, GPTConfig, batches, evaluate, learning_rate, load_corpus

ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """One method with one seed; see the module's text. ``link_nbytes_per_step`` is what the node's network device sent,
    headers and acknowledgements included, under slow_network.py; elsewhere None."""

    method: str
    seed: int
    steps: int
    world_size: int
    parameters: int
    step_seconds: Spread
    compute_seconds: Spread
    exposed_seconds: float
    sent_nbytes_per_step: float
    link_nbytes_per_step: float | None
    validation_losses: list[tuple[int, float]]
    validation_loss: float
    wrong: int

    @classmethod
    def of(cls, row: dict[str, Any]) -> Run:
        """The run that was written as ``row``."""
        spreads = {name: Spread(**row[name]) for name in ("step_seconds", "compute_seconds")}
        losses = [(step, loss) for step, loss in row["validation_losses"]]
        return cls(**{**row, **spreads, "validation_losses": losses})


@dataclass(frozen=True)
class Trained:
    """A model with what trains it.

    Attributes:
        module: To be called with a batch; returns the loss.
        optimizer: Of the parameters of ``module``.
        compute: Of a batch and of how long the optimizer has taken: how long the step takes where nothing is compressed
            or sent. All in seconds.
        whole: Within it the parameters of ``module`` are all of those that a forward pass uses.
        settle: Waits for what a step has left under way.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    compute: Callable[[Batch, float], float]
    whole: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    settle: Callable[[], object] = lambda: None


def model_of(args: argparse.Namespace) -> GPT:
    return GPT(GPTConfig(width=args.width, layers=args.layers, heads=max(1, args.width // 32), context=args.context))


def backward_seconds(module: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    module(*batch).backward()
    return time.perf_counter() - start


def update_seconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


Prepare = Callable[[str, GPT, argparse.Namespace], Trained]


class Traffic:
    """Bytes that this rank, and its node's network device, have sent since the last call; all ranks call it."""

    def __init__(self) -> None:
        self._device = interface_sent_nbytes()
        metrics.reset()

    def __call__(self) -> tuple[int, int]:
        dist.barrier()  # nothing is under way any more when the device's counter is read
        sent, device = metrics.bytes_sent(), interface_sent_nbytes()
        passed = 0 if device is None or self._device is None else device - self._device
        self._device = device
        metrics.reset()
        return sent, passed


def train(method: str, seed: int, args: argparse.Namespace, corpus: tuple[Tensor, Tensor], prepare: Prepare) -> Run:
    """One run; all ranks call it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    training, validation = corpus
    torch.manual_seed(seed)
    model = model_of(args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = prepare(method, model, args)
    generator = torch.Generator().manual_seed(seed * world_size + rank)
    sampler = batches(training, batch=args.batch, context=args.context, generator=generator)
    seconds: list[float] = []
    updates: list[float] = []
    compute: list[float] = []
    losses: list[tuple[int, float]] = []
    traffic, sent_nbytes, link_nbytes = Traffic(), 0, 0

    for number in range(args.steps):
        timed = number >= args.warmup_steps
        if number == args.warmup_steps:
            trained.settle()
            traffic()
        for group in trained.optimizer.param_groups:
            group["lr"] = learning_rate(number, args.steps, args.lr)
        batch = next(sampler)
        backward = backward_seconds(trained.module, trained.optimizer, batch)
        update = update_seconds(trained.optimizer)
        seconds.append(backward + update)
        updates.append(update)
        if (number + 1) % args.eval_every == 0 or number + 1 == args.steps:
            start = time.perf_counter()
            trained.settle()  # the next step cannot hide what this one has left under way
            seconds[-1] += time.perf_counter() - start
            sent, passed = traffic()
            if timed:
                sent_nbytes, link_nbytes = sent_nbytes + sent, link_nbytes + passed
            # By all ranks: where they share the parameters, none can do it alone.
            losses.append((number + 1, evaluate(trained.module, validation, context=args.context)))
            traffic()
    # In a phase of its own: it would take from a step what the one before has left under way.
    update = statistics.median(updates[args.warmup_steps :])
    trained.compute(batch, update)  # the first makes what it needs
    for _ in range(args.compute_steps):
        dist.barrier()
        compute.append(trained.compute(batch, update))
    most_sent = torch.tensor([sent_nbytes, link_nbytes])
    dist.all_reduce(most_sent, dist.ReduceOp.MAX)
    with trained.whole():
        wrong = differing_parameters(trained.module)
    timed_seconds = slowest(seconds)[args.warmup_steps :]
    step_seconds, compute_seconds = Spread.of(timed_seconds), Spread.of(slowest(compute))
    return Run(
        method=method,
        seed=seed,
        steps=args.steps,
        world_size=world_size,
        parameters=parameters,
        step_seconds=step_seconds,
        compute_seconds=compute_seconds,
        exposed_seconds=step_seconds.median - compute_seconds.median,
        sent_nbytes_per_step=int(most_sent[0]) / len(timed_seconds),
        link_nbytes_per_step=None if interface_sent_nbytes() is None else int(most_sent[1]) / len(timed_seconds),
        validation_losses=losses,
        validation_loss=losses[-1][1],
        wrong=wrong,
    )


def format_runs(runs: Sequence[Run], plain_method: str = "ddp") -> str:
    """One line for each method: times are medians over its seeds, the loss is their mean, the extremes beside it."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    plain = by_method.get(plain_method)
    plain_seconds = statistics.median(run.step_seconds.median for run in plain) if plain else None
    plain_loss = statistics.mean(run.validation_loss for run in plain) if plain else None
    plain_sent = plain[0].sent_nbytes_per_step if plain else None
    header = [
        "method", "step ms", "spread", "compute ms", "exposed ms", "speed-up", "sent MB", "ratio", "link MB", "loss",
        "of seeds", f"against {plain_method}", "#wrong",
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
                "" if of_seeds[0].link_nbytes_per_step is None else f"{of_seeds[0].link_nbytes_per_step / 1e6:.3f}",
                f"{loss:.4f}",
                f"{min(losses):.4f}-{max(losses):.4f}",
                f"{loss / plain_loss - 1:+.2%}" if plain_loss else "",
                str(sum(run.wrong for run in of_seeds)),
            ]
        )
    return table(header, cells)


def kept_runs(args: argparse.Namespace) -> list[Run]:
    """The runs that ``--json`` holds where the comparison is made in pieces.

    Raises:
        ValueError: They were made with other settings.
    """
    if args.at_most is None or not args.json.exists():
        return []
    document = json.loads(args.json.read_text())
    if document["settings"] != settings_of(args):
        raise ValueError(
            f"{args.json} was made with other settings: {document['settings']}, and these are {settings_of(args)}"
        )
    return [Run.of(row) for row in document["rows"]]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "at_most")}
    result: dict[str, Any] = json.loads(json.dumps(settings))  # as it will be read again
    return result


def run_all(benchmark: str, args: argparse.Namespace, prepare: Prepare, format_runs: Callable[..., str]) -> None:
    """Every method with every seed, one after the other, on all ranks of a launcher."""
    dist.init_process_group(metrics.register_counting_backend())
    rank = dist.get_rank()
    corpus = load_corpus()
    runs = kept_runs(args)
    dist.barrier()  # all have read before one writes
    done = {(run.seed, run.method) for run in runs}
    wanted = [(seed, method) for seed in args.seeds for method in args.methods if (seed, method) not in done]
    for seed, method in wanted[: args.at_most]:
        runs.append(train(method, seed, args, corpus, prepare))
        if rank == 0:
            print(f"seed {seed}, {method}: loss {runs[-1].validation_loss:.4f}", file=sys.stderr, flush=True)
            save(args.json, benchmark, runs, settings=settings_of(args))
    if rank == 0:
        print(f"{dist.get_world_size()} ranks, {runs[0].parameters} parameters, {args.steps} steps")
        print(format_runs(runs))
    wrong = sum(run.wrong for run in runs)
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        sys.exit(f"{wrong} parameters differ between ranks")


def make_parser(text: str | None, methods: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=methods, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup-steps", type=int, default=5, help="left out of times and bytes")
    parser.add_argument(
        "--compute-steps", type=int, default=10, help="how often to time the step without communication"
    )
    parser.add_argument("--eval-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="sequences per rank and step")
    parser.add_argument("--context", type=int, default=128, help="bytes per sequence")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--at-most", type=int, metavar="RUNS", help="keep what --json holds and add so many runs")
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.steps <= args.warmup_steps:
        parser.error("--steps must be more than --warmup-steps")
    if args.compute_steps < 1:
        parser.error("--compute-steps is at least 1")
    if args.at_most is not None and (args.json is None or args.at_most < 1):
        parser.error("--at-most is at least 1 and needs --json")
