"""Train a small GPT on the Python standard library's own source, with compressed gradients.

    torchrun --nproc-per-node 2 examples/train_gpt.py --codec int4 --steps 300
    torchrun --nproc-per-node 2 examples/train_gpt.py --codec none --steps 300

It runs on CUDA with NCCL where every rank has a GPU of its own, and otherwise on the CPU with gloo. The one line that
compresses is ``sr.ddp.register(...)``; the rest is an ordinary DistributedDataParallel program. Bytes are counted at
the process group (on gloo), the initial broadcast included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import smallreduce as sr


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model. Tokens are bytes, so the vocabulary has 256 entries."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 128
    vocabulary: int = 256


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind an RMS norm and added to the stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        y: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + y


class GPT(nn.Module):
    """A decoder-only transformer. All its linear layers are matrices without biases, the kind that compresses."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                into_stream = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if into_stream else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte of ``targets`` (batch, length), the bytes that follow ``tokens``."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def load_corpus() -> tuple[Tensor, Tensor]:
    """The top-level modules of this Python's standard library as two 1-D uint8 tensors: training and validation.

    Every tenth file, in alphabetical order, is held out for validation.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if len(files) < 10:
        raise FileNotFoundError("this Python has no standard library source to train on")
    held_out, rest = files[::10], [file for i, file in enumerate(files) if i % 10]

    def read(paths: list[Path]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8)

    return read(rest), read(held_out)


def batches(data: Tensor, *, batch: int, context: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of ``data``: pairs (batch, context) int64 of tokens and of the bytes that follow them.

    The generator's state is all the state there is: saving and restoring it continues the sequence.
    """
    within = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(data) - context, (batch, 1), generator=generator)
        windows = data[starts + within].long()
        yield windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def evaluate(model: nn.Module, data: Tensor, *, context: int, windows: int = 128, batch: int = 32) -> float:
    """Mean loss over ``windows`` fixed windows spread evenly over ``data``; the same tokens on every call."""
    device = next(model.parameters()).device
    starts = torch.linspace(0, len(data) - context - 1, windows).long().unsqueeze(1)
    tokens = data[starts + torch.arange(context + 1)].long().to(device)
    was_training = model.training
    model.eval()
    losses = [model(part[:, :-1], part[:, 1:]).item() * len(part) for part in torch.split(tokens, batch)]
    model.train(was_training)
    return float(sum(losses) / windows)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 30) -> float:
    """Linear warm-up to ``peak``, then linear decay to a tenth of it at the last of ``steps``."""
    return peak * min((step + 1) / warmup, 1 - 0.9 * max(0, step + 1 - warmup) / max(1, steps - warmup))


def bytes_sent() -> int | None:
    """Bytes that this rank has sent so far; None on NCCL, where nothing is counted."""
    return sr.metrics.bytes_sent() if dist.get_backend() == sr.metrics.BACKEND else None


def save_checkpoint(path: Path, shared: dict[str, Any], of_rank: dict[str, Any]) -> None:
    """Write what all ranks share once, and each rank's own state (sampler, residuals) beside it."""
    of_ranks: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(of_rank, of_ranks, dst=0)
    if of_ranks is not None:
        torch.save({**shared, "ranks": of_ranks}, path)


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what all ranks share and what belongs to this rank."""
    shared: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    of_ranks = shared.pop("ranks")
    if len(of_ranks) != dist.get_world_size():
        raise ValueError(f"{path} holds {len(of_ranks)} ranks, this run has {dist.get_world_size()}")
    return shared, of_ranks[dist.get_rank()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--codec", default="int4", help="none, int8, int4, int4-hadamard, sign, ... (default: int4)")
    add("--steps", type=int, default=300, help="length of the run, what was done before a resume included")
    add("--width", type=int, default=128, help="width of the model, a multiple of 32")
    add("--layers", type=int, default=4)
    add("--batch", type=int, default=8, help="sequences per rank and step")
    add("--context", type=int, default=128, help="bytes per sequence")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--seed", type=int, default=0)
    add("--eval-every", type=int, default=25, metavar="STEPS", help="steps between validations")
    add("--checkpoint", type=Path, metavar="FILE", help="write the state to FILE")
    add("--checkpoint-every", type=int, metavar="STEPS", help="when (default: after the last step)")
    add("--resume", type=Path, metavar="FILE", help="continue from a checkpoint, with the same settings")
    add("--json", type=Path, metavar="FILE", help="write settings and results to FILE")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else sr.metrics.register_counting_backend())

    torch.manual_seed(args.seed)
    config = GPTConfig(args.width, args.layers, args.width // 32, args.context)
    model = GPT(config).to(device)
    ddp = DistributedDataParallel(model, device_ids=[local] if on_cuda else None)
    optimizer = torch.optim.AdamW(ddp.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    hook = None if args.codec == "none" else sr.ddp.register(ddp, args.codec)

    training, validation = load_corpus()
    generator = torch.Generator().manual_seed(args.seed * world + rank)
    sampler = batches(training, batch=args.batch, context=args.context, generator=generator)

    first_step = 0
    if args.resume:
        shared, of_rank = load_checkpoint(args.resume)
        first_step = shared["step"]
        model.load_state_dict(shared["model"])
        optimizer.load_state_dict(shared["optimizer"])
        generator.set_state(of_rank["sampler"])
        if hook is not None:
            hook.load_state_dict(of_rank["hook"])

    losses: list[float] = []
    step_seconds: list[float] = []
    validations: list[dict[str, Any]] = []

    def validate(step: int) -> None:
        loss = evaluate(model, validation, context=args.context)
        validations.append({"step": step, "loss": loss, "bytes_sent": bytes_sent()})

    validate(first_step)
    steps = tqdm(range(first_step, args.steps), desc=args.codec, unit="step", disable=rank != 0)
    for step in steps:
        start = time.perf_counter()
        tokens, targets = next(sampler)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.zero_grad()
        loss = ddp(tokens.to(device), targets.to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the device, so that the time is that of a whole step
        step_seconds.append(time.perf_counter() - start)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            validate(step + 1)
        if args.checkpoint and (step + 1) % (args.checkpoint_every or args.steps) == 0:
            save_checkpoint(
                args.checkpoint,
                {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
                {"sampler": generator.get_state(), "hook": None if hook is None else hook.state_dict()},
            )
        status = f"loss {losses[-1]:.3f}, {1e3 * statistics.median(step_seconds[-20:]):.0f} ms/step"
        sent = bytes_sent()
        steps.set_postfix_str(status if sent is None else f"{status}, {sent / 1e6:.1f} MB sent")

    if rank == 0:
        print(f"validation loss {validations[-1]['loss']:.4f} after {args.steps} steps")
    if rank == 0 and args.json:
        result = {
            "settings": {name: value for name, value in vars(args).items() if name != "json"},
            "model": asdict(config),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "world_size": world,
            "device": device.type,
            "torch": torch.__version__,
            "codec": args.codec,
            "validation_loss": validations[-1]["loss"],
            "bytes_sent": validations[-1]["bytes_sent"],  # by rank 0, which sends the most
            "training_seconds": sum(step_seconds),
            "validations": validations,
            "training_losses": losses,
        }
        args.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
    # Rank 0 may still be writing, and a tensor that gloo's threads release while the interpreter shuts down aborts it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
