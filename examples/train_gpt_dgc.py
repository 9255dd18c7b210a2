"""Train the small GPT of train_gpt.py by SGD with momentum, sending a thousandth of the gradients.

    torchrun --nproc-per-node 4 examples/train_gpt_dgc.py --ratio 0.001 --steps 300
    torchrun --nproc-per-node 4 examples/train_gpt_dgc.py --ratio 1 --steps 300

With a ratio of 1 nothing is compressed and DGC is torch.optim.SGD, so the second run is what the first is to be
compared with. Deep Gradient Compression: Lin et al., arXiv:1712.01887.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import smallreduce as sr
from train_gpt import GPT, GPTConfig, batches, bytes_sent, evaluate, learning_rate, load_corpus


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ratio", type=float, default=0.001, help="share of the gradient's elements that is sent (default: 0.001)")
    add("--warmup", type=int, default=10, metavar="STEPS", help="of each of the paper's four stages (default: 10)")
    add("--steps", type=int, default=300)
    add("--width", type=int, default=128, help="width of the model, a multiple of 32")
    add("--layers", type=int, default=4)
    add("--batch", type=int, default=8, help="sequences per rank and step")
    add("--context", type=int, default=128, help="bytes per sequence")
    add("--lr", type=float, default=0.1, help="peak learning rate")
    add("--clip-norm", type=float, default=1.0, help="of the gradient of each parameter")
    add("--seed", type=int, default=0)
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
    model = GPT(GPTConfig(args.width, args.layers, args.width // 32, args.context)).to(device)
    ddp = DistributedDataParallel(model, device_ids=[local] if on_cuda else None)
    optimizer = sr.optim.DGC(
        ddp,
        args.lr,
        momentum=0.9,
        nesterov=True,
        ratio=args.ratio,
        warmup=sr.optim.dgc_warmup(args.warmup) if args.ratio < 1 else (),
        clip_norm=args.clip_norm,
    )

    training, validation = load_corpus()
    generator = torch.Generator().manual_seed(args.seed * world + rank)
    sampler = batches(training, batch=args.batch, context=args.context, generator=generator)
    steps = tqdm(range(args.steps), desc=f"DGC, ratio {args.ratio:g}", unit="step", disable=rank != 0)
    for step in steps:
        tokens, targets = next(sampler)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.zero_grad()
        loss = ddp(tokens.to(device), targets.to(device))
        loss.backward()  # sends, while it computes
        optimizer.step()
        steps.set_postfix_str(f"loss {loss.item():.3f}")

    loss = evaluate(model, validation, context=args.context)
    if rank == 0:
        sent = bytes_sent()
        print(f"validation loss {loss:.4f} after {args.steps} steps")
        print(optimizer.stats() if sent is None else f"{optimizer.stats()}\nrank 0 has sent {sent / 1e6:.1f} MB in all")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
