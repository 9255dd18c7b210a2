"""Train the small GPT of train_gpt.py under FSDP2, with compressed gradients and compressed weights.

    torchrun --nproc-per-node 4 examples/train_gpt_fsdp.py
    torchrun --nproc-per-node 4 examples/train_gpt_fsdp.py --gradients int8-hadamard,int4-hadamard --node-size 2
    torchrun --nproc-per-node 4 examples/train_gpt_fsdp.py --gradients none --weights none            # stock FSDP2
    torchrun --nproc-per-node 2 examples/train_gpt_fsdp.py --resume CHECKPOINT                        # of any 4 ranks

Each block is a unit of ``fully_shard``, and the rest another. The one line that compresses is
``sr.fsdp.compress(...)``. Checkpoints are those of torch.distributed.checkpoint: a run that continues one may have
another number of ranks.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import smallreduce as sr
from train_gpt import GPT, GPTConfig, batches, bytes_sent, evaluate, learning_rate, load_corpus


def codec_of(text: str) -> str | tuple[str, str] | None:
    """``none``, a codec, or two with a comma between them: inside a node, and between nodes."""
    if text == "none":
        return None
    intra, comma, inter = text.partition(",")
    return (intra, inter) if comma else intra


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gradients", type=codec_of, default="int4-hadamard", help="codec; none; or two: inside and between nodes")
    add("--weights", type=codec_of, default="int8", help="codec, or none (default: int8)")
    add("--differences", action="store_true", help="send what weights have changed by (--weights int4 will do then)")
    add("--node-size", type=int, help="ranks of a node, for two codecs (default: as torchrun has it)")
    add("--feedback", choices=["int8", "full"], help="error feedback of the gradients (default: none)")
    add("--steps", type=int, default=300, help="length of the run, what was done before a resume included")
    add("--width", type=int, default=128, help="width of the model, a multiple of 32")
    add("--layers", type=int, default=4)
    add("--batch", type=int, default=8, help="sequences per rank and step")
    add("--context", type=int, default=128, help="bytes per sequence")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--seed", type=int, default=0)
    add("--checkpoint", type=Path, metavar="FOLDER", help="write the state to FOLDER")
    add("--checkpoint-at", type=int, metavar="STEP", help="when, and end there (default: after the last step)")
    add("--resume", type=Path, metavar="FOLDER", help="continue from a checkpoint, with the same settings")
    return parser.parse_args()


def save(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, compression: sr.fsdp.State, step: int) -> None:
    """Writes the state after ``step`` steps; all ranks call it, each writes its part."""
    weights, moments = get_state_dict(model, optimizer)
    compressed = compression.sharded_state_dict()
    state = {"model": weights, "optimizer": moments, "compression": compressed, "step": torch.tensor(step)}
    dcp.save(state, checkpoint_id=folder)


def load(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, compression: sr.fsdp.State) -> int:
    """Reads what :func:`save` wrote, on whatever number of ranks, and returns the step; all ranks call it."""
    header = {"compression": {"ranks": torch.zeros(2, dtype=torch.int64)}}
    dcp.load(header, checkpoint_id=folder)
    weights, moments = get_state_dict(model, optimizer)
    shards, replicas = header["compression"]["ranks"].tolist()
    compressed = compression.sharded_state_dict((shards, replicas))
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "compression": compressed, "step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    compression.load_sharded_state_dict(state["compression"])
    return int(state["step"])


def main() -> None:
    args = parse_arguments()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else sr.metrics.register_counting_backend())

    torch.manual_seed(args.seed)  # all ranks begin with the same weights
    model = GPT(GPTConfig(args.width, args.layers, args.width // 32, args.context)).to(device)
    mesh = init_device_mesh(device.type, (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    compression = sr.fsdp.compress(
        model,
        gradients=args.gradients,
        weights=args.weights,
        feedback=args.feedback,
        node_size=args.node_size,
        differences=args.differences,
    )
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1)

    first_step = load(args.resume, model, optimizer, compression) if args.resume else 0

    training, validation = load_corpus()
    generator = torch.Generator()
    sampler = batches(training, batch=args.batch, context=args.context, generator=generator)

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        generator.manual_seed((args.seed * args.steps + step) * world + rank)  # all the state that the sampler has
        tokens, targets = next(sampler)
        return tokens.to(device), targets.to(device)

    last_step = args.checkpoint_at or args.steps
    steps = tqdm(range(first_step, last_step), desc="FSDP2", unit="step", disable=rank != 0)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.zero_grad()
        loss = model(*batch_of(step))
        loss.backward()
        optimizer.step()
        steps.set_postfix_str(f"loss {loss.item():.3f}")

    sent = bytes_sent()  # before the checkpoint, which exchanges its plan
    if args.checkpoint:
        save(args.checkpoint, model, optimizer, compression, last_step)
    loss = evaluate(model, validation, context=args.context)  # by all ranks: none has all of the weights
    if rank == 0:
        print(f"validation loss {loss:.4f} after {last_step} steps")
        print(compression.stats())
        if sent is not None:
            print(f"rank 0 has sent {sent / 1e6:.1f} MB in all")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
