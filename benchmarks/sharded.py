"""Training a small GPT with sharded data parallelism, compressed and as torch has it: step time, bytes and loss.

    python benchmarks/slow_network.py --ranks 4 --ranks-per-node 2 --rate 1gbit -- python benchmarks/sharded.py
    torchrun --nproc-per-node 4 benchmarks/sharded.py --node-size 2 --methods ddp sdp4bit --steps 2000 --seeds 0 1 2

Model, corpus, schedule and figures are those of ``training.py``, whose program this is but for the methods, all of
them but one with AdamW:

ddp                     DistributedDataParallel
ddp-int4                the same with ``sr.ddp.register(model, "int4")``
zero                    torch's ZeroRedundancyOptimizer, under DistributedDataParallel
fsdp2                   torch's fully_shard of every block and of the whole
fsdp2-int4              the same under ``sr.fsdp.compress``: gradients in int4-hadamard, weights in int8
fsdp2-two-level         gradients in int8-hadamard inside a node and int4-hadamard between nodes, weights in int8,
                        both on two levels
fsdp2-packets           the same, with the weights' packets kept from the forward pass for the backward pass
fsdp2-differences       gradients as with fsdp2-two-level, weights as 4-bit differences
fsdp2-int4-loco         as fsdp2-int4, with the error feedback of LoCo, whose residual is kept in 8 bits
ragged                  ``sr.ragged.fully_shard`` of every block and of the whole, without codecs
ragged-int4             gradients in int4-hadamard, weights in int8
ragged-two-level        gradients and weights as with fsdp2-two-level
ragged-adam8bit         without codecs, with ``sr.optim.BlockAdam8bit``
sdp4bit                 ``sr.optim.SDP4Bit``: two-level gradients, 4-bit differences of weights
sdp4bit-exact           without compression; and with one part of it alone:
sdp4bit-weights         4-bit weights, not differences
sdp4bit-differences     4-bit differences of weights
sdp4bit-gradients       two-level gradients
sdp4bit-plain-gradients the same without the Hadamard transform

``-keep`` at the end of an fsdp2 or ragged method keeps the gathered weights from the forward pass for the backward pass
(``reshard_after_forward=False``).

compute    is the forward and backward pass of the same model on each rank alone, without any wrapper, and AdamW on as
           many parameters as a rank updates: all with DDP, else their number divided by that of the ranks
sent       counts what a rank sends inside its node too; "link" is what the node's network device sent, all included
loss       is compared with that of ddp, times and bytes are with those of fsdp2
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import smallreduce as sr
from comparison import (
    ADAMW,
    Batch,
    Run,
    Trained,
    backward_seconds,
    check_arguments,
    format_runs,
    make_parser,
    model_of,
    run_all,
    update_seconds,
)
from train_gpt import GPT  # comparison.py has put its folder on the path

Gradients = str | tuple[str, str] | None
WEIGHTS = "int4:group=2048"
TWO_LEVEL = ("int8-hadamard:group=128", "int4-hadamard:group=128")


@dataclass(frozen=True)
class FSDP2:
    """``fully_shard``, and what ``sr.fsdp.compress`` is told."""

    gradients: Gradients = None
    weights: str | None = None
    feedback: str | None = None
    keep_packets: bool = False
    differences: bool = False

    @property
    def compresses(self) -> bool:
        return self.gradients is not None or self.weights is not None


@dataclass(frozen=True)
class Ragged:
    """What ``sr.ragged.fully_shard`` is told."""

    gradients: Gradients = None
    weights: str | None = None
    feedback: str | None = None
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    granularity: sr.ragged.Granularity = "group"


@dataclass(frozen=True)
class SDP4Bit:
    """What ``sr.optim.SDP4Bit`` is told."""

    weights: str | None = None
    differences: bool = True
    gradients: Gradients = None


KEEP = "-keep"
DDPS = {"ddp": None, "ddp-int4": "int4"}
FSDP2S = {
    "fsdp2": FSDP2(),
    "fsdp2-int4": FSDP2("int4-hadamard", "int8"),
    "fsdp2-two-level": FSDP2(("int8-hadamard", "int4-hadamard"), "int8"),
    "fsdp2-packets": FSDP2(("int8-hadamard", "int4-hadamard"), "int8", keep_packets=True),
    "fsdp2-differences": FSDP2(("int8-hadamard", "int4-hadamard"), WEIGHTS, differences=True),
    "fsdp2-int4-loco": FSDP2("int4-hadamard", "int8", "int8"),
}
RAGGEDS = {
    "ragged": Ragged(),
    "ragged-int4": Ragged("int4-hadamard", "int8"),
    "ragged-two-level": Ragged(("int8-hadamard", "int4-hadamard"), "int8"),
    "ragged-adam8bit": Ragged(optimizer=sr.optim.BlockAdam8bit, granularity=sr.optim.BlockAdam8bit.granularity),
}
SDP4BITS = {
    "sdp4bit": SDP4Bit(WEIGHTS, True, TWO_LEVEL),
    "sdp4bit-exact": SDP4Bit(),
    "sdp4bit-weights": SDP4Bit(WEIGHTS, False),
    "sdp4bit-differences": SDP4Bit(WEIGHTS, True),
    "sdp4bit-gradients": SDP4Bit(gradients=TWO_LEVEL),
    "sdp4bit-plain-gradients": SDP4Bit(gradients=("int8:group=128", "int4:group=128")),
}
SHARDED = (*FSDP2S, *RAGGEDS)
METHODS = ("ddp", "ddp-int4", "zero", *SHARDED, *(f"{method}{KEEP}" for method in SHARDED), *SDP4BITS)
DEFAULT_METHODS = (
    "ddp", "ddp-int4", "zero", "fsdp2", "fsdp2-keep", "fsdp2-int4", "fsdp2-two-level", "fsdp2-packets",
    "fsdp2-differences", "ragged", "ragged-int4", "ragged-two-level", "sdp4bit-exact", "sdp4bit",
)  # fmt: skip


class Alone:
    """A rank's computing without the others: the model without any wrapper, and AdamW on a part of the parameters.

    Args:
        parts: The optimizer has one of so many equal parts.
    """

    def __init__(self, args: argparse.Namespace, parts: int) -> None:
        self._args, self._parts = args, parts

    @functools.cached_property
    def _made(self) -> tuple[GPT, torch.optim.Optimizer]:
        # Not before it is asked for, so that whoever measures memory has none of it.
        with torch.random.fork_rng(devices=[]):
            model = model_of(self._args)
        part = nn.Parameter(torch.zeros(sum(p.numel() for p in model.parameters()) // self._parts))
        return model, torch.optim.AdamW([part], lr=self._args.lr, **ADAMW)

    def __call__(self, batch: Batch, update: float) -> float:
        """Seconds of a step; ``update``, what the method's own optimizer took with its communication, is no part."""
        model, optimizer = self._made
        model.zero_grad(set_to_none=True)
        seconds = backward_seconds(model, optimizer, batch)
        (part,) = optimizer.param_groups[0]["params"]
        part.grad = torch.ones_like(part)
        return seconds + update_seconds(optimizer)


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within it the parameters of ``model`` are whole, as its all-gathers deliver them; all ranks call it."""
    modules = [module for module in model.modules() if isinstance(module, (FSDPModule, sr.ragged.RaggedModule))]
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


def shard(model: GPT, reshard_after_forward: bool) -> None:
    """Stock FSDP2: each block is a unit, and what remains, embeddings and head, another."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)


def shard_ragged(model: GPT, told: Ragged, node_size: int | None, reshard_after_forward: bool) -> None:
    """The units of :func:`shard`."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options: dict[str, Any] = dict(
        mesh=mesh,
        granularity=told.granularity,
        gradients=told.gradients,
        weights=told.weights,
        feedback=told.feedback,
        node_size=node_size if isinstance(told.gradients, tuple) else None,
    )
    for block in model.blocks:
        sr.ragged.fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    sr.ragged.fully_shard(model, **options)


def prepare(method: str, model: GPT, args: argparse.Namespace) -> Trained:
    """Makes ``model`` one that ``method`` trains; all ranks call it."""
    options: dict[str, Any] = dict(lr=args.lr, **ADAMW)
    compute = Alone(args, 1 if method in DDPS else dist.get_world_size())
    optimizer: torch.optim.Optimizer
    if method in DDPS:
        ddp = DistributedDataParallel(model)
        if DDPS[method] is not None:
            sr.ddp.register(ddp, DDPS[method])
        return Trained(ddp, torch.optim.AdamW(ddp.parameters(), **options), compute)
    if method == "zero":
        ddp = DistributedDataParallel(model)
        optimizer = ZeroRedundancyOptimizer(
            ddp.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, **options
        )
        return Trained(ddp, optimizer, compute)
    if method in SDP4BITS:
        told = SDP4BITS[method]
        sdp4bit = sr.optim.SDP4Bit(
            model,
            torch.optim.AdamW,
            weights=told.weights,
            differences=told.differences,
            gradients=told.gradients,
            node_size=args.node_size,
            **options,
        )
        return Trained(model, sdp4bit, compute, settle=sdp4bit.synchronize)
    if method.removesuffix(KEEP) in RAGGEDS:
        ragged = RAGGEDS[method.removesuffix(KEEP)]
        shard_ragged(model, ragged, args.node_size, not method.endswith(KEEP))
        optimizer = ragged.optimizer(model.parameters(), **options)
        return Trained(model, optimizer, compute, whole=functools.partial(unsharded, model))
    fsdp2 = FSDP2S[method.removesuffix(KEEP)]
    shard(model, reshard_after_forward=not method.endswith(KEEP))
    if fsdp2.compresses:
        sr.fsdp.compress(
            model,
            gradients=fsdp2.gradients,
            weights=fsdp2.weights,
            feedback=fsdp2.feedback,
            keep_packets=fsdp2.keep_packets,
            differences=fsdp2.differences,
            node_size=args.node_size if isinstance(fsdp2.gradients, tuple) else None,
        )
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    return Trained(model, optimizer, compute, whole=functools.partial(unsharded, model))


def tables(runs: Sequence[Run]) -> str:
    """Times and bytes are compared with stock FSDP2 where it was run, losses with DDP in the documentation."""
    return format_runs(runs, "fsdp2" if any(run.method == "fsdp2" for run in runs) else "ddp")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, DEFAULT_METHODS)
    parser.add_argument("--node-size", type=int, help="ranks of a node; default: as the launcher says")
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    if unknown := [method for method in args.methods if method not in METHODS]:
        parser.error(f"no method is called {unknown[0]!r}; there are {', '.join(METHODS)}")
    return args


if __name__ == "__main__":
    run_all("sharded", parse_arguments(), prepare, tables)
