"""Plans of the buckets of public models: how much of them is padding, and how long planning takes.

    python benchmarks/plans.py
    python benchmarks/plans.py --models GPT-OSS-120B --ranks 64 1024 --block-rows 128 --cases 1000 --larger-cases 0

A bucket is a decoder layer, or the rest of the model. A block is a number of rows of a matrix, that is of its last
dimension: of every matrix, or of the weights of the routed experts only. What is not in blocks may be cut anywhere.

padding    elements of all buckets beyond the parameters, in per cent of the parameters; in brackets a bound below which
           no layout can be (``plan_checks.lower_bound``)
bucket     the longest median time to plan one bucket
model      the sum of the median times of its different buckets
reported   the padding of veScale-FSDP's planner (arXiv:2602.22437) by readers' notes on it; on how many ranks, and with
           which tensors in blocks, they do not say

Every plan is checked against the definition. Then the planner is compared with brute force: on small cases, of which it
tries every order, and on larger ones, which it searches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from measurement import Spread, save, table
from model_shapes import MODELS, Bucket, Model
from plan_checks import Case, brute_force, illegal, lower_bound, random_cases
from smallreduce.ragged._plan import plan

REPORTED = {
    ("DeepSeek-V3-671B", 1): "< 3",
    ("DeepSeek-V3-671B", 16): "< 3",
    ("DeepSeek-V3-671B", 128): "mostly < 3",
    ("GPT-OSS-120B", 1): "< 3",
    ("GPT-OSS-120B", 16): "< 3",
    ("GPT-OSS-120B", 128): "up to 18",
}


@dataclass(frozen=True)
class Row:
    """A model on a number of ranks; see the module's text. ``blocked`` is "matrices" or "experts", ``wrong`` the number
    of tensors that are not laid as they must be."""

    model: str
    blocked: str
    block_rows: int
    world_size: int
    align: int
    parameters: int
    padding_numel: int
    bound_numel: int
    seconds: float
    slowest_bucket: str
    slowest_seconds: Spread
    wrong: int

    @property
    def padding_percent(self) -> float:
        return 100 * self.padding_numel / self.parameters

    @property
    def bound_percent(self) -> float:
        return 100 * self.bound_numel / self.parameters


@dataclass(frozen=True)
class Compared:
    """The planner against brute force on random cases: how many shards are the smallest, by how much the others are
    larger at most, and in how many cases even the smallest are larger than an equal part, rounded to ``align``."""

    tensors: tuple[int, int]
    ranks: tuple[int, int]
    seed: int
    cases: int
    smallest: int
    worst_ratio: float
    beyond_equal_parts: int
    wrong: int


def tensors_of(bucket: Bucket, block_rows: int, blocked: str) -> tuple[tuple[int, int], ...]:
    """``(numel, block)`` of its parameters. A vector is no matrix: it may be cut anywhere."""
    return tuple(
        (
            parameter.numel,
            block_rows * parameter.shape[-1]
            if len(parameter.shape) > 1 and (parameter.is_expert or blocked == "matrices")
            else 1,
        )
        for parameter in bucket.parameters
    )


def measure(model: Model, block_rows: int, blocked: str, world_size: int, align: int, repeats: int) -> Row:
    padding = bound = wrong = 0
    times = {}
    for bucket in model.buckets:
        case = Case(tensors_of(bucket, block_rows, blocked), world_size, align)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            made = plan(*case)
            seconds.append(time.perf_counter() - start)
        times[bucket.name] = Spread.of(seconds)
        padding += bucket.count * made.padding
        bound += bucket.count * (world_size * lower_bound(case) - bucket.numel)
        wrong += illegal(made)
    slowest = max(times, key=lambda name: times[name].median)
    return Row(
        model=model.name,
        blocked=blocked,
        block_rows=block_rows,
        world_size=world_size,
        align=align,
        parameters=model.numel,
        padding_numel=padding,
        bound_numel=bound,
        seconds=sum(spread.median for spread in times.values()),
        slowest_bucket=slowest,
        slowest_seconds=times[slowest],
        wrong=wrong,
    )


def compare(cases: int, tensors: tuple[int, int], ranks: tuple[int, int], seed: int = 0) -> Compared:
    smallest = beyond = wrong = 0
    worst = 1.0
    for case in random_cases(cases, seed, tensors, ranks):
        made, best = plan(*case), brute_force(case)
        wrong += illegal(made)
        smallest += made.shard_size == best
        worst = max(worst, made.shard_size / best if best else 1.0)
        beyond += best >= -(-made.numel // case.world_size) + case.align
    return Compared(tensors, ranks, seed, cases, smallest, worst, beyond, wrong)


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each model and kind of blocks, with the padding on each number of ranks."""
    world_sizes = list(dict.fromkeys(row.world_size for row in rows))
    lines: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.model, row.blocked, row.block_rows), []).append(row)
    cells = []
    for (model, blocked, block_rows), of_line in lines.items():
        slowest = max(row.slowest_seconds.median for row in of_line)
        cells.append(
            [
                model,
                blocked,
                str(block_rows),
                *(f"{row.padding_percent:.2f} ({row.bound_percent:.2f})" for row in of_line),
                f"{1e3 * slowest:.1f}",
                f"{1e3 * max(row.seconds for row in of_line):.1f}",
                REPORTED.get((model, block_rows), ""),
            ]
        )
    header = ["padding, %", "blocks in", "rows", *(f"{size} ranks" for size in world_sizes)]
    return table([*header, "bucket ms", "model ms", "reported"], cells)


def format_comparison(compared: Compared) -> str:
    lowest, highest = compared.tensors
    return (
        f"{compared.cases} random cases of {lowest} to {highest} tensors on {compared.ranks[0]} to {compared.ranks[1]} "
        f"ranks, {compared.beyond_equal_parts} of them with no layout in equal parts: the smallest shards in "
        f"{compared.smallest / compared.cases:.2%}, at most {compared.worst_ratio:.2f} times the smallest"
    )


def parse_arguments() -> argparse.Namespace:
    names = [model.name for model in MODELS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="MODEL")
    parser.add_argument("--ranks", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--block-rows", nargs="+", type=int, default=[1, 16, 128])
    parser.add_argument("--align", type=int, default=8, help="elements; 8 of bf16 are 16 bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", type=int, default=10000, help="small ones, against brute force; 0: none")
    parser.add_argument("--larger-cases", type=int, default=300)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rows = []
    for blocked in ("matrices", "experts"):
        for model in MODELS:
            has_experts = any(parameter.is_expert for bucket in model.buckets for parameter in bucket.parameters)
            if model.name not in args.models or (blocked == "experts" and not has_experts):
                continue
            for block_rows in args.block_rows:
                for world_size in args.ranks:
                    rows.append(measure(model, block_rows, blocked, world_size, args.align, args.repeats))
    print(format_rows(rows))
    compared = []
    if args.cases:
        compared.append(compare(args.cases, tensors=(1, 5), ranks=(1, 5)))
    if args.larger_cases:
        compared.append(compare(args.larger_cases, tensors=(9, 11), ranks=(8, 24)))
    print("\n".join(["", *map(format_comparison, compared)]))
    save(args.json, "plans", rows, compared_with_brute_force=[asdict(comparison) for comparison in compared])


if __name__ == "__main__":
    main()
