"""Train a small convolutional network on the handwritten digits of scikit-learn, sending a thousandth of the gradients.

    torchrun --nproc-per-node 4 examples/digits.py
    torchrun --nproc-per-node 4 examples/digits.py --ratio 1      # momentum SGD, nothing compressed

It runs on the CPU with gloo. The optimizer is ``sr.optim.DGC`` in the place of ``torch.optim.SGD``; the rest is an
ordinary DistributedDataParallel program. Bytes are counted at the process group, the initial broadcast included.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import smallreduce as sr
from train_gpt import learning_rate


class DigitsNet(nn.Module):
    """Three convolutions and two linear layers, all without biases: matrices and larger, the kind that compresses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 256, bias=False),
            nn.ReLU(),
            nn.Linear(256, 10, bias=False),
        )
        for parameter in self.parameters():
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of ``labels`` (batch) given ``images`` (batch, 1, 8, 8)."""
        return F.cross_entropy(self.layers(images), labels)


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8), fp32 from -1 to 1, and their labels (n), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load() -> tuple[Digits, Digits, Digits]:
    """The 1797 digits that come with scikit-learn: 998 to train with, 200 to choose settings by and 599 to test.

    The split is fixed: of nine consecutive images the first, fourth and seventh are for testing, the second for
    validation.
    """
    data, target = load_digits(return_X_y=True)
    images = torch.tensor(data, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(target)
    place = torch.arange(len(labels)) % 9
    of_test, of_validation = place % 3 == 0, place == 1
    return tuple(  # type: ignore[return-value]
        Digits(images[chosen], labels[chosen]) for chosen in (~of_test & ~of_validation, of_validation, of_test)
    )


def batches(
    data: Digits, *, batch: int, rank: int, world_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless: this rank's images and labels, ``batch`` of them, of every step.

    In each epoch the ranks divide one random order of ``data`` among themselves, for which their generators must have
    the same seed; what does not fill a batch on every rank is left out of that epoch.
    """
    steps = len(data) // (batch * world_size)
    if steps == 0:
        raise ValueError(f"{world_size} ranks with {batch} images each need more than {len(data)} images")
    while True:
        order = torch.randperm(len(data), generator=generator)
        for chosen in order[: steps * world_size * batch].view(steps, world_size, batch)[:, rank]:
            yield data.images[chosen], data.labels[chosen]


@torch.no_grad()
def evaluate(model: DigitsNet, data: Digits) -> tuple[float, float]:
    """The mean loss over ``data``, in nats, and the accuracy, from 0 to 1."""
    scores = model.layers(data.images)
    right = (scores.argmax(dim=1) == data.labels).sum().item()
    return F.cross_entropy(scores, data.labels).item(), right / len(data)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ratio", type=float, default=0.001, help="the share of the gradients that is sent (default: 0.001)")
    add("--warmup", type=int, default=15, metavar="STEPS", help="of each of the four stages in which more is sent")
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
    ddp = DistributedDataParallel(model)
    warmup = sr.optim.dgc_warmup(args.warmup) if args.ratio < 1 else ()
    optimizer = sr.optim.DGC(ddp, args.lr, args.momentum, nesterov=True, ratio=args.ratio, warmup=warmup)

    training, _, test = load()
    generator = torch.Generator().manual_seed(args.seed)
    sampler = batches(training, batch=args.batch, rank=rank, world_size=world_size, generator=generator)

    steps = tqdm(range(args.steps), desc=f"ratio {args.ratio:g}", unit="step", disable=rank != 0)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.zero_grad()
        loss = ddp(*next(sampler))
        loss.backward()
        optimizer.step()
        steps.set_postfix_str(f"loss {loss.item():.3f}, {sr.metrics.bytes_sent() / 1e6:.1f} MB sent")

    if rank == 0:
        print(f"test accuracy {100 * evaluate(model, test)[1]:.2f} % after {args.steps} steps")
    # A tensor that gloo's threads release while the interpreter shuts down aborts it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
