"""Training with the sparse optimizers against momentum SGD: what they reach in equal steps, and what they send.

    torchrun --nproc-per-node 4 benchmarks/convergence.py --task digits --seeds 0 1 2
    torchrun --nproc-per-node 2 benchmarks/convergence.py --task gpt --methods sgd dgc --seeds 0 1 2

Tasks: ``digits``, the network and the data of ``examples/digits.py``, and ``gpt``, those of ``examples/train_gpt.py``.

Methods, R being the overall compression ratio, 32 or 256:

sgd                torch.optim.SGD under DistributedDataParallel: what the others are compared with
dgc, dgc-fp16      sr.optim.DGC at 99.9 % sparsity, values in fp32 or fp16, after the paper's warm-up of the sparsity:
                   75, 93.75, 98.4375 and 99.6 %, a fourth of ``--sparsity-warmup`` steps each
cser-R             sr.optim.CSER as its authors train on ImageNet: C2 of 1/64 of the blocks, C1 of 1/4 every 16 steps
                   (R = 32); 1/512 and 1/16 every 32 (R = 256)
cser-pl-R, csea-R  its relatives: CSER-PL with C1 of 1/8 every 4 steps, and 1/16 every 16; CSEA with 1/R
ef-sgd-R           SGD with error feedback, of 1/R of the blocks
qsparse-R          QSparse-local-SGD, of 8/R of the blocks every 8 steps

All have the same momentum, schedule of the learning rate and, for each seed, initial parameters and batches. Gradients
are clipped to ``--clip-norm``, parameter by parameter: for sgd their mean, and for all others each rank's own, before
anything is compressed, to sqrt(N) times the norm on N ranks, as DGC does: the mean of independent ones is then alike.

Of several ``--learning-rates`` the peak is chosen for each method: that which ends with the lowest validation loss on
``--tuning-seed``, which is none of those reported; with the digits, on images that are none of those tested on.
What is evaluated is, where ranks differ, their average (``averaged()`` of CSER). Reported are, over ``--seeds``,

loss       on held-out data after the last step, in nats: the test images, or the fixed validation windows of the text
accuracy   on the test images, in percent
sent       payload that a rank sends in a step, counted at the process group (smallreduce.metrics), the most of all;
           and how many times less than sgd: in all steps, and in those after ``--sparsity-warmup``
ratio      of compression, as the codecs state it: fp32 bits of the gradients for one that is sent, after the warm-up
apart      how far the ranks' parameters are from their mean: root mean square over the ranks, relative to the mean
#wrong     parameters, over all ranks, whose bits differ from rank 0's in what is evaluated
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import smallreduce as sr
from measurement import REPOSITORY, differing_parameters, save, table
from smallreduce import metrics

sys.path.insert(0, str(REPOSITORY / "examples"))
import digits
import train_gpt

RATIO = 0.001
CSER = {32: (64, 4, 16), 256: (512, 16, 32)}  # R: 1/C2, 1/C1, interval
PARTIAL_LOCAL_SGD = {32: (8, 4), 256: (16, 16)}  # R: 1/C1, interval
QSPARSE_INTERVAL = 8
FAMILIES = ("cser", "cser-pl", "csea", "ef-sgd", "qsparse")
METHODS = ("sgd", "dgc", "dgc-fp16", *(f"{family}-{ratio}" for ratio in CSER for family in FAMILIES))


@dataclass(frozen=True)
class Run:
    """One method with one seed; see the module's text. Bytes are those of the rank that sends the most."""

    method: str
    seed: int
    tuning: bool
    lr: float
    steps: int
    world_size: int
    parameters: int
    compression_ratio: float
    sent_nbytes: int
    sent_nbytes_after_warmup: int
    loss: float
    accuracy: float | None
    validation_loss: float
    apart: float
    wrong: int
    seconds: float


class Task(Protocol):
    """What is trained on. A model takes a batch and returns its mean loss."""

    def model(self) -> nn.Module:
        """With initial parameters from torch's default generator."""

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of this rank."""

    def validate(self, model: nn.Module) -> float:
        """The loss by which learning rates are chosen."""

    def evaluate(self, model: nn.Module) -> tuple[float, float | None]:
        """The loss that is reported, and the accuracy in percent where there is one."""


class Digits:
    """examples/digits.py."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._batch: int = args.batch
        self._training, self._validation, self._test = digits.load()

    def model(self) -> nn.Module:
        return digits.DigitsNet()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return digits.batches(self._training, batch=self._batch, rank=rank, world_size=world_size, generator=generator)

    def validate(self, model: nn.Module) -> float:
        assert isinstance(model, digits.DigitsNet)
        return digits.evaluate(model, self._validation)[0]

    def evaluate(self, model: nn.Module) -> tuple[float, float | None]:
        assert isinstance(model, digits.DigitsNet)
        loss, accuracy = digits.evaluate(model, self._test)
        return loss, 100 * accuracy


class Text:
    """examples/train_gpt.py."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._config = train_gpt.GPTConfig(
            width=args.width, layers=args.layers, heads=max(1, args.width // 32), context=args.context
        )
        self._batch: int = args.batch
        self._training, self._validation = train_gpt.load_corpus()

    def model(self) -> nn.Module:
        return train_gpt.GPT(self._config)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed * dist.get_world_size() + dist.get_rank())
        return train_gpt.batches(self._training, batch=self._batch, context=self._config.context, generator=generator)

    def validate(self, model: nn.Module) -> float:
        return train_gpt.evaluate(model, self._validation, context=self._config.context)

    def evaluate(self, model: nn.Module) -> tuple[float, float | None]:
        return self.validate(model), None


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {"digits": Digits, "gpt": Text}


@dataclass(frozen=True)
class Trained:
    """A model with what trains it.

    Attributes:
        module: To be called with a batch.
        optimizer: Steps along the gradients of ``module``.
        compression_ratio: As the codecs state it.
        averaged: Within it ``module`` is what to evaluate.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    compression_ratio: float
    averaged: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def prepare(method: str, model: nn.Module, lr: float, args: argparse.Namespace) -> Trained:
    """Makes ``model`` one that ``method`` trains; all ranks call it.

    Raises:
        ValueError: There is no such method.
    """
    options: dict[str, Any] = dict(lr=lr, momentum=args.momentum, nesterov=args.nesterov)
    if method == "sgd":
        ddp = DistributedDataParallel(model)
        return Trained(ddp, torch.optim.SGD(ddp.parameters(), **options), 1.0)
    if method in ("dgc", "dgc-fp16"):
        ddp = DistributedDataParallel(model)
        values = torch.float16 if method == "dgc-fp16" else torch.float32
        warmup = sr.optim.dgc_warmup(args.sparsity_warmup // 4)
        optimizer = sr.optim.DGC(ddp, ratio=RATIO, warmup=warmup, values=values, clip_norm=args.clip_norm, **options)
        return Trained(ddp, optimizer, 32 / sr.TopK(RATIO, values).bits_per_element)
    if method not in METHODS:
        raise ValueError(f"no method is called {method!r}; there are {', '.join(METHODS)}")
    family, _, digits_of_ratio = method.rpartition("-")
    ratio = int(digits_of_ratio)
    if family == "cser":
        gradient, reset, interval = CSER[ratio]
        cser = sr.optim.CSER(
            model,
            gradient_codec=sr.RandomBlocks(1 / gradient),
            model_codec=sr.RandomBlocks(1 / reset),
            reset_interval=interval,
            **options,
        )
    elif family == "cser-pl":
        reset, interval = PARTIAL_LOCAL_SGD[ratio]
        cser = sr.optim.CSER.partial_local_sgd(
            model, codec=sr.RandomBlocks(1 / reset), reset_interval=interval, **options
        )
    elif family == "csea":
        cser = sr.optim.CSER.csea(model, codec=sr.RandomBlocks(1 / ratio), **options)
    elif family == "ef-sgd":
        cser = sr.optim.CSER.ef_sgd(model, codec=sr.RandomBlocks(1 / ratio), **options)
    else:
        codec = sr.RandomBlocks(QSPARSE_INTERVAL / ratio)
        cser = sr.optim.CSER.qsparse_local_sgd(model, codec=codec, reset_interval=QSPARSE_INTERVAL, **options)
    return Trained(model, cser, cser.compression_ratio, cser.averaged)


def clip(model: nn.Module, limit: float) -> None:
    """Shortens the gradient of each parameter to ``limit``."""
    for parameter in model.parameters():
        nn.utils.clip_grad_norm_([parameter], limit)


def distance(model: nn.Module) -> float:
    """How far the ranks' parameters are from their mean: root mean square over the ranks, relative to the mean."""
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).double()
    mean = flat.clone()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    squares = (flat - mean).square().sum()
    dist.all_reduce(squares)
    return float((squares / dist.get_world_size()).sqrt() / mean.norm())


def train(method: str, seed: int, lr: float, args: argparse.Namespace, task: Task, tuning: bool = False) -> Run:
    """One run; all ranks call it."""
    start = time.perf_counter()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    model = task.model()
    trained = prepare(method, model, lr, args)
    batches = task.batches(seed)
    limit = args.clip_norm
    if method.startswith("dgc"):
        limit = None  # it clips before it compresses
    elif limit is not None and method != "sgd":
        limit *= math.sqrt(world_size)  # of a rank's own gradients, for their mean to be of the other norm
    sent = torch.zeros(args.steps, dtype=torch.int64)
    for step in range(args.steps):
        for group in trained.optimizer.param_groups:
            group["lr"] = train_gpt.learning_rate(step, args.steps, lr, args.lr_warmup)
        metrics.reset()
        trained.optimizer.zero_grad(set_to_none=True)
        trained.module(*next(batches)).backward()
        if limit is not None:
            clip(model, limit)
        trained.optimizer.step()
        sent[step] = metrics.bytes_sent()
    totals = torch.stack([sent.sum(), sent[args.sparsity_warmup :].sum()])
    dist.all_reduce(totals, dist.ReduceOp.MAX)
    apart = distance(model)
    figures = torch.full((3,), math.nan, dtype=torch.float64)
    with trained.averaged():
        wrong = differing_parameters(model)
        if rank == 0:
            loss, accuracy = task.evaluate(model)
            figures[:] = torch.tensor([task.validate(model), loss, math.nan if accuracy is None else accuracy])
        dist.broadcast(figures, src=0)
    validation_loss, loss, percent = figures.tolist()
    return Run(
        method=method,
        seed=seed,
        tuning=tuning,
        lr=lr,
        steps=args.steps,
        world_size=world_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        compression_ratio=trained.compression_ratio,
        sent_nbytes=int(totals[0]),
        sent_nbytes_after_warmup=int(totals[1]),
        loss=loss,
        accuracy=None if math.isnan(percent) else percent,
        validation_loss=validation_loss,
        apart=apart,
        wrong=wrong,
        seconds=time.perf_counter() - start,
    )


def train_all(method: str, args: argparse.Namespace, task: Task) -> Iterator[Run]:
    """The runs that choose the learning rate, if there is a choice, and then that of each seed; all ranks call it."""
    chosen = args.learning_rates[0]
    if len(args.learning_rates) > 1:
        tried = []
        for lr in args.learning_rates:
            tried.append(train(method, args.tuning_seed, lr, args, task, tuning=True))
            yield tried[-1]
        # One that diverged has a loss of NaN, which compares with nothing.
        best = min(tried, key=lambda run: math.inf if math.isnan(run.validation_loss) else run.validation_loss)
        chosen = best.lr
    for seed in args.seeds:
        yield train(method, seed, chosen, args, task)


def format_runs(runs: Sequence[Run], sparsity_warmup: int) -> str:
    """One line for each method: means over its seeds, with the extremes beside what was reached."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        if not run.tuning:
            by_method.setdefault(run.method, []).append(run)
    plain = by_method.get("sgd")
    header = ["method", "lr", "loss", "of seeds", "against sgd"]
    with_accuracy = runs[0].accuracy is not None
    if with_accuracy:
        header += ["accuracy", "of seeds", "against sgd"]
    header += ["sent kB", "after warm-up", "times less", "after warm-up", "ratio", "apart", "#wrong"]

    def sent(of_method: Sequence[Run]) -> tuple[float, float]:
        steps = of_method[0].steps
        return (
            statistics.mean(run.sent_nbytes for run in of_method) / steps,
            statistics.mean(run.sent_nbytes_after_warmup for run in of_method) / (steps - sparsity_warmup),
        )

    cells = []
    for method, of_method in by_method.items():
        losses = [run.loss for run in of_method]
        loss = statistics.mean(losses)  # NaN if one run diverged
        spread = f"{min(losses):.4f}-{max(losses):.4f}"
        if math.isnan(loss):
            spread = f"NaN: {sum(map(math.isnan, losses))} of {len(losses)}"
        line = [method, f"{of_method[0].lr:g}", f"{loss:.4f}", spread]
        line.append(f"{loss / statistics.mean(run.loss for run in plain) - 1:+.2%}" if plain else "")
        if with_accuracy:
            percents, of_plain = ([run.accuracy or 0.0 for run in of] for of in (of_method, plain or []))
            percent = statistics.mean(percents)
            line += [f"{percent:.2f}", f"{min(percents):.2f}-{max(percents):.2f}"]
            line.append(f"{percent - statistics.mean(of_plain):+.2f}" if plain else "")
        line += [f"{nbytes / 1e3:.2f}" for nbytes in sent(of_method)]
        if plain:
            line += [f"{of / nbytes:.1f}" for of, nbytes in zip(sent(plain), sent(of_method), strict=True)]
        else:
            line += ["", ""]
        line += [f"{of_method[0].compression_ratio:.1f}", f"{max(run.apart for run in of_method):.1e}"]
        line.append(str(sum(run.wrong for run in of_method)))
        cells.append(line)
    return table(header, cells)


DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"steps": 640, "batch": 16, "learning_rates": [0.003, 0.01, 0.03, 0.1]},
    # An element waits for about a thousand steps, so a run has many thousands, too many to choose the rate by.
    "gpt": {"steps": 10_000, "batch": 2, "learning_rates": [0.2], "clip_norm": 0.1},
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: 640 of digits, 10000 of gpt")
    parser.add_argument("--batch", type=int, help="images or sequences per rank and step; default: 16, and 2")
    parser.add_argument("--learning-rates", nargs="+", type=float, metavar="LR", help="peaks to choose from; one: it")
    parser.add_argument("--tuning-seed", type=int, default=1000)
    parser.add_argument("--lr-warmup", type=int, default=30, metavar="STEPS", help="in which the learning rate rises")
    parser.add_argument("--sparsity-warmup", type=int, metavar="STEPS", help="of dgc; default: a tenth of --steps")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--nesterov", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--clip-norm", type=float, help="of the gradient of each parameter; default: none, gpt 0.1")
    parser.add_argument("--width", type=int, default=128, help="of the gpt")
    parser.add_argument("--layers", type=int, default=2, help="of the gpt")
    parser.add_argument("--context", type=int, default=64, help="of the gpt: bytes per sequence")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    for name, value in DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.sparsity_warmup is None:
        args.sparsity_warmup = 4 * (args.steps // 40)
    if args.tuning_seed in args.seeds:
        parser.error("--tuning-seed must be none of --seeds")
    if args.sparsity_warmup % 4 or not 4 <= args.sparsity_warmup < args.steps:
        parser.error("--sparsity-warmup must be a multiple of 4, from 4 to less than --steps")
    return args


def main() -> None:
    args = parse_arguments()
    dist.init_process_group(metrics.register_counting_backend())
    rank = dist.get_rank()
    task = TASKS[args.task](args)
    runs: list[Run] = []
    for method in args.methods:
        for run in train_all(method, args, task):
            runs.append(run)
            if rank == 0:
                accuracy = "" if run.accuracy is None else f", accuracy {run.accuracy:.2f} %"
                print(
                    f"{method}, seed {run.seed}, lr {run.lr:g}: loss {run.loss:.4f}{accuracy}, "
                    f"validation loss {run.validation_loss:.4f}, {run.seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    if rank == 0:
        print(f"{dist.get_world_size()} ranks, {runs[0].parameters} parameters, {args.steps} steps")
        print(format_runs(runs, args.sparsity_warmup))
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        save(args.json, "convergence", runs, settings=settings)
    wrong = sum(run.wrong for run in runs)
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        sys.exit(f"{wrong} parameters differ between ranks")


if __name__ == "__main__":
    main()
