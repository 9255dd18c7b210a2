"""Train the small GPT of train_gpt.py under ragged sharding, with compressed gradients and weights.

    torchrun --nproc-per-node 4 examples/train_gpt_ragged.py
    torchrun --nproc-per-node 4 examples/train_gpt_ragged.py --optimizer adam8bit                # moments in 8 bits
    torchrun --nproc-per-node 4 examples/train_gpt_ragged.py --optimizer muon --plan
    torchrun --nproc-per-node 2 examples/train_gpt_ragged.py --resume CHECKPOINT                 # of any 4 ranks

Each block is a unit of ``sr.ragged.fully_shard``, and the rest another. No rank has a part of a row, and of a group of
the codecs; for ``sr.optim.BlockAdam8bit`` none has a part of one of its tiles. ``sr.optim.Muon`` is for the matrices of
the blocks, beside an AdamW for all else. Checkpoints are those of torch.distributed.checkpoint: a run that continues
one may have another number of ranks.
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from tqdm import tqdm

import smallreduce as sr
from train_gpt import GPT, GPTConfig, batches, bytes_sent, evaluate, learning_rate, load_corpus
from train_gpt_fsdp import codec_of

ADAM: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
OPTIMIZERS = ("adamw", "adam8bit", "muon")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adamw")
    add("--gradients", type=codec_of, default="int4-hadamard", help="codec; none; or two: inside and between nodes")
    add("--weights", type=codec_of, default="int8", help="codec, or none (default: int8)")
    add("--node-size", type=int, help="ranks of a node, for two codecs (default: as torchrun has it)")
    add("--feedback", choices=["int8", "full"], help="error feedback of the gradients (default: none)")
    add("--plan", action="store_true", help="print how a block lies on the ranks")
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


def rows_of(optimizer: str, name: str, parameter: nn.Parameter) -> int:
    """How many rows of a matrix, or elements of a vector, an optimizer needs whole on one rank."""
    return sr.optim.BlockAdam8bit.granularity(name, parameter) if optimizer == "adam8bit" else 1


def make_optimizers(kind: str, model: GPT, lr: float) -> list[Optimizer]:
    """One for all parameters, or Muon for the matrices of the blocks and AdamW for the rest."""
    if kind == "adam8bit":
        return [sr.optim.BlockAdam8bit(model.parameters(), lr, **ADAM)]
    if kind == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr, **ADAM)]
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.dim() == 2]
    chosen = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    # With this adjustment its updates are as large as AdamW's, so that one learning rate does for both.
    muon = sr.optim.Muon(matrices, lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr, **ADAM)]


def save(folder: Path, model: GPT, optimizers: list[Optimizer], compression: sr.fsdp.State, step: int) -> None:
    """Writes the state after ``step`` steps; all ranks call it, each writes its part."""
    weights, moments = get_state_dict(model, optimizers)
    compressed = compression.sharded_state_dict()
    state = {"model": weights, "optimizers": moments, "compression": compressed, "step": torch.tensor(step)}
    dcp.save(state, checkpoint_id=folder)


def load(folder: Path, model: GPT, optimizers: list[Optimizer], compression: sr.fsdp.State) -> int:
    """Reads what :func:`save` wrote, on whatever number of ranks, and returns the step; all ranks call it."""
    header = {"compression": {"ranks": torch.zeros(2, dtype=torch.int64)}}
    dcp.load(header, checkpoint_id=folder)
    weights, moments = get_state_dict(model, optimizers)
    compressed = compression.sharded_state_dict(header["compression"]["ranks"])
    state: dict[str, Any] = {
        "model": weights,
        "optimizers": moments,
        "compression": compressed,
        "step": torch.tensor(0),
    }
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizers"])
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
    options: dict[str, Any] = dict(
        mesh=init_device_mesh(device.type, (world,)),
        granularity=functools.partial(rows_of, args.optimizer),
        gradients=args.gradients,
        weights=args.weights,
        feedback=args.feedback,
        node_size=args.node_size,
    )
    for block in model.blocks:
        sr.ragged.fully_shard(block, **options)
    sr.ragged.fully_shard(model, **options)
    if rank == 0 and args.plan:
        first: Any = model.blocks[0]
        print(first.plans[0])
    compression = sr.ragged.state(model)
    optimizers = make_optimizers(args.optimizer, model, args.lr)

    first_step = load(args.resume, model, optimizers, compression) if args.resume else 0

    training, validation = load_corpus()
    generator = torch.Generator()
    sampler = batches(training, batch=args.batch, context=args.context, generator=generator)

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        generator.manual_seed((args.seed * args.steps + step) * world + rank)  # all the state that the sampler has
        tokens, targets = next(sampler)
        return tokens.to(device), targets.to(device)

    last_step = args.checkpoint_at or args.steps
    steps = tqdm(range(first_step, last_step), desc=args.optimizer, unit="step", disable=rank != 0)
    for step in steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            optimizer.zero_grad()
        loss = model(*batch_of(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # over the elements of all ranks
        for optimizer in optimizers:
            optimizer.step()
        steps.set_postfix_str(f"loss {loss.item():.3f}")

    sent, compressed = bytes_sent(), compression.stats()  # before the checkpoint, which exchanges its plan
    if args.checkpoint:
        save(args.checkpoint, model, optimizers, compression, last_step)
    loss = evaluate(model, validation, context=args.context)  # by all ranks: none has all of the weights
    if rank == 0:
        print(f"validation loss {loss:.4f} after {last_step} steps")
        print(compressed)
        for optimizer in optimizers:
            if isinstance(optimizer, sr.optim.Muon):
                print(optimizer.stats())
        if sent is not None:
            print(f"rank 0 has sent {sent / 1e6:.1f} MB in all")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
