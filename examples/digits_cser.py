"""Train a small convolutional network on scikit-learn's digits with CSER, or with one of its relatives.

    torchrun --nproc-per-node 4 examples/digits_cser.py
    torchrun --nproc-per-node 4 examples/digits_cser.py --method qsparse-local-sgd --lr 0.02

It runs on the CPU with gloo. The model is a plain module: gradients stay local, and ``sr.optim.CSER`` sends what the
ranks need to know of each other. It is evaluated as the average over the ranks. Bytes are counted at the process group,
the initial broadcast included.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from tqdm import tqdm

import smallreduce as sr
from digits import DigitsNet, batches, evaluate, load
from train_gpt import learning_rate

METHODS = ("cser", "csea", "cser-pl", "ef-sgd", "qsparse-local-sgd")


def make(method: str, model: DigitsNet, lr: float, momentum: float, ratio: float) -> sr.optim.CSER:
    """The optimizer that sends ``1 / ratio`` of what uncompressed gradients would take.

    Random blocks, and the intervals of the paper's experiments with ImageNet: those at ratio 32 up to 64, else at 256.
    """

    def blocks(share: float) -> sr.RandomBlocks:
        return sr.RandomBlocks(min(share / ratio, 1.0))

    mild = ratio <= 64
    if method == "cser":
        interval = 16 if mild else 32
        return sr.optim.CSER(
            model, lr, momentum, gradient_codec=blocks(0.5), model_codec=blocks(interval / 2), reset_interval=interval
        )
    if method == "csea":
        return sr.optim.CSER.csea(model, lr, blocks(1), momentum=momentum)
    if method == "cser-pl":
        interval = 4 if mild else 16
        return sr.optim.CSER.partial_local_sgd(model, lr, blocks(interval), interval, momentum=momentum)
    if method == "ef-sgd":
        return sr.optim.CSER.ef_sgd(model, lr, blocks(1), momentum=momentum)
    if method == "qsparse-local-sgd":
        return sr.optim.CSER.qsparse_local_sgd(model, lr, blocks(8), 8, momentum=momentum)
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", choices=METHODS, default="cser")
    add("--compression-ratio", type=float, default=32, help="how many times less is sent, from 16 on (default: 32)")
    add("--steps", type=int, default=600)
    add("--batch", type=int, default=16, help="images per rank and step")
    add("--lr", type=float, default=0.05, help="peak learning rate")
    add("--momentum", type=float, default=0.9)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    dist.init_process_group(sr.metrics.register_counting_backend())
    rank, world_size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(args.seed)
    model = DigitsNet()
    optimizer = make(args.method, model, args.lr, args.momentum, args.compression_ratio)

    training, _, test = load()
    generator = torch.Generator().manual_seed(args.seed)
    sampler = batches(training, batch=args.batch, rank=rank, world_size=world_size, generator=generator)

    steps = tqdm(range(args.steps), desc=f"{args.method} at {args.compression_ratio:g}", unit="step", disable=rank != 0)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.zero_grad()
        loss = model(*next(sampler))
        loss.backward()
        optimizer.step()
        steps.set_postfix_str(f"loss {loss.item():.3f}, {sr.metrics.bytes_sent() / 1e6:.1f} MB sent")

    stats = optimizer.stats()
    with optimizer.averaged():
        loss_of_test, accuracy = evaluate(model, test)
    if rank == 0:
        print(stats)
        print(f"test accuracy {100 * accuracy:.2f} %, loss {loss_of_test:.4f} after {args.steps} steps")
    # A tensor that gloo's threads release while the interpreter shuts down aborts it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
