"""Train the small GPT of train_gpt.py with SDP4Bit: optimizer state sharded, gradients and weights at four bits.

    torchrun --nproc-per-node 4 examples/train_gpt_sdp4bit.py
    torchrun --nproc-per-node 4 examples/train_gpt_sdp4bit.py --node-size 2    # as if on two machines
    torchrun --nproc-per-node 4 examples/train_gpt_sdp4bit.py --exact          # the same without compression
    torchrun --nproc-per-node 2 examples/train_gpt_sdp4bit.py --resume CHECKPOINT

The model is a plain module, without DistributedDataParallel: ``sr.optim.SDP4Bit`` reduces the gradients of all ranks
while the backward pass computes, updates each rank's part, and sends what the weights have changed by. Checkpoints are
those of torch.distributed.checkpoint: a run that continues one may have another number of ranks. SDP4Bit: Jia et al.,
arXiv:2410.15526.
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
from tqdm import tqdm

import smallreduce as sr
from train_gpt import GPT, GPTConfig, batches, bytes_sent, evaluate, learning_rate, load_corpus


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--exact", action="store_true", help="compress nothing")
    add("--node-size", type=int, help="ranks of a node (default: as torchrun says)")
    add("--start-step", type=int, default=0, help="first step that compresses")
    add("--clip-norm", type=float, default=1.0, help="of the gradient of all parameters together")
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


def state_of(model: GPT, optimizer: sr.optim.SDP4Bit, step: int) -> dict[str, Any]:
    """What a checkpoint holds: the weights that all ranks have, and of the optimizer each rank's part."""
    return {"model": model.state_dict(), "optimizer": optimizer.checkpoint(), "step": torch.tensor(step)}


def load(folder: Path, model: GPT, optimizer: sr.optim.SDP4Bit) -> int:
    """Reads a checkpoint, of whatever number of ranks, and returns the step; all ranks call it."""
    state = state_of(model, optimizer, 0)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    optimizer.load_checkpoint(state["optimizer"])
    return int(state["step"])


def main() -> None:
    args = parse_arguments()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else sr.metrics.register_counting_backend())

    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(args.width, args.layers, args.width // 32, args.context)).to(device)
    codecs: dict[str, Any] = {"weights": None, "gradients": None} if args.exact else {}
    optimizer = sr.optim.SDP4Bit(
        model,
        torch.optim.AdamW,
        node_size=args.node_size,
        start_step=args.start_step,
        lr=args.lr,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        **codecs,
    )
    first_step = load(args.resume, model, optimizer) if args.resume else 0

    training, validation = load_corpus()
    generator = torch.Generator()
    sampler = batches(training, batch=args.batch, context=args.context, generator=generator)

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        generator.manual_seed((args.seed * args.steps + step) * world + rank)  # all the state that the sampler has
        tokens, targets = next(sampler)
        return tokens.to(device), targets.to(device)

    last_step = args.checkpoint_at or args.steps
    steps = tqdm(range(first_step, last_step), desc="SDP4Bit", unit="step", disable=rank != 0)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.zero_grad()
        loss = model(*batch_of(step))
        loss.backward()  # reduces the gradients, while it computes
        optimizer.clip_grad_norm_(args.clip_norm)
        optimizer.step()  # the weights arrive while the next forward pass computes
        steps.set_postfix_str(f"loss {loss.item():.3f}")

    sent = bytes_sent()  # before the checkpoint, which exchanges its plan
    if args.checkpoint:
        dcp.save(state_of(model, optimizer, last_step), checkpoint_id=args.checkpoint)
    loss = evaluate(model, validation, context=args.context)
    if rank == 0:
        print(f"validation loss {loss:.4f} after {last_step} steps")
        print(f"{optimizer.stats()}\n{optimizer.memory()}")
        if sent is not None:
            print(f"rank 0 has sent {sent / 1e6:.1f} MB in all")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
