"""`make demo`: train the same GPT twice on two ranks, with and without compression, and compare.

    python examples/demo.py [--codec int4] [--steps 300]

Both runs start from the same weights and see the same data in the same order. The results go into the folder ``demo``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

RANKS = 2


def train(codec: str, steps: int, folder: Path) -> dict[str, Any]:
    """Run examples/train_gpt.py under torchrun and return what it wrote."""
    result = folder / f"{codec.replace(':', '-')}.json"
    program = Path(__file__).with_name("train_gpt.py")
    # torchrun would give each rank one thread, whatever the machine has.
    threads = str(max(1, (os.cpu_count() or 1) // RANKS))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    arguments = ["--codec", codec, "--steps", str(steps), "--json", str(result)]
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    subprocess.run([*torchrun, str(program), *arguments], check=True, env=environment)
    run: dict[str, Any] = json.loads(result.read_text())
    return run


def megabytes(run: dict[str, Any]) -> str:
    return "not counted" if run["bytes_sent"] is None else f"{run['bytes_sent'] / 1e6:.1f} MB"


def table(plain: dict[str, Any], compressed: dict[str, Any]) -> str:
    """The two runs and their ratio, as text."""

    def row(run: dict[str, Any]) -> tuple[str, ...]:
        return run["codec"], f"{run['validation_loss']:.4f}", megabytes(run), f"{run['training_seconds']:.1f} s"

    loss = compressed["validation_loss"] / plain["validation_loss"] - 1
    time = compressed["training_seconds"] / plain["training_seconds"]
    sent = "-" if plain["bytes_sent"] is None else f"1/{plain['bytes_sent'] / compressed['bytes_sent']:.2f}"
    header = ("", "validation loss", "sent by a rank", "training time")
    rows = [header, row(plain), row(compressed), ("compared", f"{loss:+.2%}", sent, f"x {time:.2f}")]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """Validation loss over steps, and over the bytes that a rank has sent."""
    counted = all(run["bytes_sent"] is not None for run in runs)
    figure, panels = pyplot.subplots(
        1, 2 if counted else 1, figsize=(10 if counted else 5, 4), sharey=True, squeeze=False
    )
    for run in runs:
        steps, losses, sent = ([point[name] for point in run["validations"]] for name in ("step", "loss", "bytes_sent"))
        panels[0, 0].plot(steps, losses, label=run["codec"])
        if counted:
            panels[0, 1].plot([nbytes / 1e6 for nbytes in sent], losses, label=run["codec"])
    panels[0, 0].set(xlabel="step", ylabel="validation loss, nats per byte")
    panels[0, 0].legend()
    if counted:
        panels[0, 1].set(xlabel="sent by a rank, MB", xscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    runs = [train(codec, args.steps, args.folder) for codec in ("none", args.codec)]
    path = args.folder / "demo.png"
    picture(runs, path)
    print(f"\n{table(*runs)}\n\npicture: {path.resolve()}")


if __name__ == "__main__":
    main()
