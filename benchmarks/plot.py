"""Turns the committed results into the tables and pictures of the documentation.

    python benchmarks/plot.py           # rewrites README.md, docs/benchmarks.md and docs/images/
    python benchmarks/plot.py --print   # prints the tables instead

Everything between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->`` in those pages is made here, from the files in
``benchmarks/results/`` and from nothing else, so that every figure has a command, a machine and a commit. A test
compares the pages, and the digests that the pictures carry, with the results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
IMAGES = REPOSITORY / "docs" / "images"
PAGES = (REPOSITORY / "README.md", REPOSITORY / "docs" / "benchmarks.md")

Document = dict[str, Any]  # one results file
Row = dict[str, Any]


def load(folder: Path = RESULTS) -> dict[str, Document]:
    """All results, by the path of their file below the folder without its suffix, in order of these names."""
    paths = sorted(folder.rglob("*.json"), key=lambda path: path.with_suffix("").parts)
    documents = {path.relative_to(folder).with_suffix("").as_posix(): json.loads(path.read_text()) for path in paths}
    return {name: document for name, document in documents.items() if document.get("benchmark") in SECTIONS}


# ---- Markdown ------------------------------------------------------------------------------------------------------


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    columns = lines[0].count(" | ") + 1
    return "\n".join([lines[0], "|---" * columns + "|", *lines[1:]])


def where(document: Document) -> str:
    """The command and the machine of a result, in a sentence."""
    link = document["link_rate"]
    launcher, ranks = "", document["world_size"]
    if link is not None:
        nodes = document["ranks_per_node"]
        launcher = f"benchmarks/slow_network.py --ranks {ranks} --rate {link} " + (
            "-- python " if nodes == "1" else f"--ranks-per-node {nodes} -- python "
        )
    elif ranks > 1:
        launcher = f"-m torch.distributed.run --nproc-per-node {ranks} "
    processor = document["gpu"] or f"{document['processor']}, {document['cores']} cores"
    changed = " with uncommitted changes" if document["uncommitted_changes"] else ""
    commit = f"commit {document['commit'][:10]}{changed}" if document["commit"] else "no commit known"
    return (
        f"`python {launcher}{document['command']}`  \n{processor}; torch {document['torch']}; "
        f"kernels {document['smallreduce']['cpu']}; {commit}; {document['time'][:10]}."
    )


def milliseconds(spread: Row) -> str:
    return f"{1e3 * spread['median']:.3g} ({1e3 * spread['low']:.3g}-{1e3 * spread['high']:.3g})"


def kernels_section(document: Document) -> str:
    ours = [row for row in document["rows"] if row["moved_nbytes"] is not None]
    others = [row for row in document["rows"] if row["moved_nbytes"] is None]
    operations = list(dict.fromkeys(row["operation"] for row in ours))
    megabytes = ours[0]["uncompressed_nbytes"] / 1e6
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in ours):
        by_codec: dict[str, dict[str, Row]] = {}
        for row in ours:
            if row["dtype"] == dtype:
                by_codec.setdefault(row["codec"], {})[row["operation"]] = row
        parts.append(
            f"{megabytes:.0f} MB of {dtype}, {document['threads']} thread(s): GB/s (and the fraction of a copy).\n\n"
            + markdown(
                [dtype, *operations],
                (
                    [f"`{codec}`", *(f"{rows[op]['gb_per_s']:.1f} ({rows[op]['fraction']:.2f})" for op in operations)]
                    for codec, rows in by_codec.items()
                ),
            )
        )
    if others:
        parts.append(
            "Other libraries on the same fp32 buffer, in the same run:\n\n"
            + markdown(
                ["library", "operation", "GB/s", "fraction of a copy"],
                (
                    [row["codec"], row["operation"], f"{row['gb_per_s']:.1f}", f"{row['fraction']:.2f}"]
                    for row in others
                ),
            )
        )
    selections = {
        row["codec"]: row["seconds"]["median"]
        for row in document["rows"]
        if (row["operation"], row["dtype"]) == ("encode", "fp32")
    }
    if {"topk:0.001", "torch.topk 0.1 %"} <= selections.keys():
        times = selections["torch.topk 0.1 %"] / selections["topk:0.001"]
        parts.append(f"`topk:0.001` encodes {times:.0f} times as fast as `torch.topk` selects (target: 40).")
    wanted = [row for row in ours if row["target"] is not None]
    if wanted:
        parts.append(
            "Targets:\n\n"
            + markdown(
                ["codec", "dtype", "operation", "target", "measured", ""],
                (
                    [
                        f"`{row['codec']}`", row["dtype"], row["operation"], f"{row['target']:.2f}",
                        f"{row['fraction']:.2f}", "met" if row["fraction"] >= row["target"] else "missed",
                    ]
                    for row in wanted
                ),
            )
        )  # fmt: skip
    return "\n\n".join(parts)


def collectives_section(document: Document) -> str:
    largest = max(row["nbytes"] for row in document["rows"])
    rows = [row for row in document["rows"] if row["nbytes"] == largest]
    rate = bits_per_second(document["link_rate"])
    table = markdown(
        [
            "collective", "codec", "torch, ms", "ms", "on the wire, ms", "speed-up", "ratio", "of ratio", "error",
            "wrong", "target",
        ],
        (
            [
                row["collective"], f"`{row['codec']}`", milliseconds(row["torch_seconds"]),
                milliseconds(row["seconds"]), "" if rate is None else f"{8e3 * row['wire_nbytes'] / rate:.1f}",
                f"{row['speedup']:.2f}", f"{row['ratio']:.2f}",
                f"{row['speedup'] / row['ratio']:.2f}", f"{row['relative_error']:.1e}", str(row["wrong"]),
                collective_target(row),
            ]
            for row in rows
        ),
    )  # fmt: skip
    sizes = sorted({row["nbytes"] for row in document["rows"]})
    swept = f" The file has {len(sizes)} sizes from {sizes[0]} bytes." if len(sizes) > 1 else ""
    return f"{largest} bytes of fp32 on {document['world_size']} ranks, {link_name(document)}.{swept}\n\n{table}"


def collective_target(row: Row) -> str:
    if row["target_speedup"] is None:
        return ""
    return f"{row['target_speedup']:.2f} {'met' if row['speedup'] >= row['target_speedup'] else 'missed'}"


def training_section(document: Document) -> str:
    runs = by_method(document)
    first = document["rows"][0]
    seeds = len({run["seed"] for run in document["rows"]})
    plain_loss = mean_loss(runs["ddp"]) if "ddp" in runs else None
    plain_step = step_seconds(runs["ddp"]) if "ddp" in runs else None
    plain_sent = runs["ddp"][0]["sent_nbytes_per_step"] if "ddp" in runs else None

    def cells(method: str, of_method: list[Row]) -> list[str]:
        losses = [run["validation_loss"] for run in of_method]
        loss, sent = mean_loss(of_method), of_method[0]["sent_nbytes_per_step"]
        step, compute = (
            step_seconds(of_method),
            statistics.median(run["compute_seconds"]["median"] for run in of_method),
        )
        low = min(run["step_seconds"]["low"] for run in of_method)
        high = max(run["step_seconds"]["high"] for run in of_method)
        return [
            f"`{method}`",
            f"{1e3 * step:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})",
            f"{1e3 * compute:.0f}",
            f"{1e3 * exposed_seconds(of_method):.0f}",
            "" if plain_step is None else f"{plain_step / step:.2f}",
            f"{sent / 1e6:.3f}",
            "" if plain_sent is None else f"{plain_sent / sent:.1f}",
            f"{loss:.4f}" + (f" ({min(losses):.4f}-{max(losses):.4f})" if len(losses) > 1 else ""),
            # DGC is SGD with momentum, here at AdamW's learning rate: its loss says nothing.
            "" if plain_loss is None or method == "dgc" else f"{loss / plain_loss - 1:+.2%}",
            str(sum(run["wrong"] for run in of_method)),
        ]

    table = markdown(
        [
            "method",
            "step, ms",
            "compute, ms",
            "exposed, ms",
            "speed-up",
            "MB sent",
            "ratio",
            "validation loss",
            "against ddp",
            "wrong",
        ],
        (cells(method, of_method) for method, of_method in runs.items()),
    )
    settings = (
        f"{first['parameters'] / 1e6:.2f} M parameters, {first['steps']} steps, {first['world_size']} ranks, "
        f"{seeds} seed(s), {link_name(document)}."
    )
    verdicts = []
    if document["link_rate"] == "100mbit" and {"ddp", "dgc"} <= runs.keys():
        dense, sparse = exposed_seconds(runs["ddp"]), exposed_seconds(runs["dgc"])
        met = "met" if 30 * sparse <= dense else "missed"
        verdicts.append(
            f"`dgc`: {1e3 * sparse:.1f} ms exposed, `ddp` {1e3 * dense:.0f} ms; target a thirtieth ({met})."
        )
    return "\n\n".join([settings, table, *verdicts])


def convergence_section(document: Document) -> str:
    settings, first = document["settings"], document["rows"][0]
    runs = by_method({**document, "rows": [run for run in document["rows"] if not run["tuning"]]})
    with_accuracy, plain = first["accuracy"] is not None, runs.get("sgd")

    def sent(of_method: list[Row]) -> tuple[float, float]:
        steps, after = first["steps"], settings["sparsity_warmup"]
        total, later = mean(of_method, "sent_nbytes"), mean(of_method, "sent_nbytes_after_warmup")
        return total / steps, later / (steps - after)

    def times_less(plain: list[Row], of_method: list[Row]) -> list[float]:
        return [of_plain / nbytes for of_plain, nbytes in zip(sent(plain), sent(of_method), strict=True)]

    def worse(plain: list[Row], of_method: list[Row]) -> float:
        """By how many points of accuracy, or which part of the loss."""
        if with_accuracy:
            return mean(plain, "accuracy") - mean(of_method, "accuracy")
        return mean(of_method, "loss") / mean(plain, "loss") - 1

    def reached(of_method: list[Row], name: str, places: int) -> str:
        values = [run[name] for run in of_method]
        diverged = sum(map(math.isnan, values))
        if diverged:
            return f"NaN with {diverged} of {len(values)} seeds"
        return f"{mean(of_method, name):.{places}f} ({min(values):.{places}f}-{max(values):.{places}f})"

    def cells(method: str, of_method: list[Row]) -> list[str]:
        against = ["", "", ""]
        if plain is not None:
            by = worse(plain, of_method)
            against = ["" if math.isnan(by) else f"{0 - by:+.2f}" if with_accuracy else f"{by:+.2%}"]
            against += [f"{times:.1f}" for times in times_less(plain, of_method)]
        return [
            f"`{method}`",
            f"{of_method[0]['lr']:g}",
            reached(of_method, "loss", 4),
            *([reached(of_method, "accuracy", 2)] if with_accuracy else []),
            against[0],
            *(f"{nbytes / 1e3:.2f}" for nbytes in sent(of_method)),
            *against[1:],
            f"{of_method[0]['compression_ratio']:.1f}",
            f"{max(run['apart'] for run in of_method):.1e}",
            str(sum(run["wrong"] for run in of_method)),
        ]

    def verdict(method: str, plain: list[Row], of_method: list[Row]) -> str:
        by, times = worse(plain, of_method), times_less(plain, of_method)[1]
        text, target = (
            (f"{by:.2f} points of accuracy below `sgd`, target 0.5", 0.5)
            if with_accuracy
            else (f"{by:+.2%} of the loss of `sgd`, target +1 %", 0.01)
        )
        return (
            f"`{method}`: {text} ({'met' if by <= target else 'missed'}); {times:.0f} times fewer bytes after the "
            f"warm-up, target 200 ({'met' if times >= 200 else 'missed'})."
        )

    rates, seeds = settings["learning_rates"], {run["seed"] for run in document["rows"] if not run["tuning"]}
    chosen = f"out of {', '.join(map(str, rates))}, by another seed" if len(rates) > 1 else str(rates[0])
    clipped = "" if settings["clip_norm"] is None else f"gradients clipped to {settings['clip_norm']:g} each; "
    text = (
        f"`{settings['task']}`: {first['parameters'] / 1e6:.2f} M parameters, {first['steps']} steps, "
        f"{first['world_size']} ranks with batches of {settings['batch']}, {len(seeds)} seed(s); "
        f"{'Nesterov ' if settings['nesterov'] else ''}momentum {settings['momentum']}; sparsity warm-up of "
        f"{settings['sparsity_warmup']} steps; {clipped}learning rate {chosen}."
    )
    table = markdown(
        [
            "method", "lr", "loss", *(["accuracy, %"] if with_accuracy else []), "against sgd", "kB sent",
            "after warm-up", "times less", "after warm-up", "ratio", "apart", "wrong",
        ],
        (cells(method, of_method) for method, of_method in runs.items()),
    )  # fmt: skip
    verdicts = [verdict(method, plain, runs[method]) for method in ("dgc", "dgc-fp16") if plain and method in runs]
    return "\n\n".join([text, table, *verdicts])


def by_method(document: Document) -> dict[str, list[Row]]:
    runs: dict[str, list[Row]] = {}
    for run in document["rows"]:
        runs.setdefault(run["method"], []).append(run)
    return runs


def step_seconds(runs: list[Row]) -> float:
    return float(statistics.median(run["step_seconds"]["median"] for run in runs))


def exposed_seconds(runs: list[Row]) -> float:
    """What communication and compression add to a step."""
    return float(statistics.median(run["exposed_seconds"] for run in runs))


def mean(runs: list[Row], name: str) -> float:
    return float(statistics.mean(run[name] for run in runs))


def mean_loss(runs: list[Row]) -> float:
    return mean(runs, "validation_loss")


def bits_per_second(link_rate: str | None) -> float | None:
    """Of a rate as tc writes it; None without a limit."""
    match = re.fullmatch(r"([0-9.]+)(k|m|g)bit", link_rate or "none")
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]] if match else None


def link_name(document: Document) -> str:
    rate = document["link_rate"]
    if rate is None:
        return "loopback"
    return (
        "links without a limit"
        if rate == "none"
        else f"links of {rate.replace('mbit', ' Mb/s').replace('gbit', ' Gb/s')}"
    )


SECTIONS: dict[str, Callable[[Document], str]] = {
    "kernels": kernels_section,
    "collectives": collectives_section,
    "training": training_section,
    "convergence": convergence_section,
}


def section(benchmark: str, documents: dict[str, Document]) -> str:
    """The tables of all results of one benchmark, each with what made it."""
    parts = [
        f"### {name}\n\n{where(document)}\n\n{SECTIONS[benchmark](document)}"
        for name, document in documents.items()
        if document["benchmark"] == benchmark
    ]
    return "\n\n".join(parts) if parts else "Not measured yet."


def summary(documents: dict[str, Document]) -> str:
    """What the README shows: step times on limited links beside losses after equal steps, and the pictures."""
    limited = limited_trainings(documents)
    if not limited:
        return "Nothing yet; [docs/benchmarks.md](docs/benchmarks.md) says how to measure."
    methods = list(dict.fromkeys(method for document in limited for method in by_method(document)))
    compared = [
        document
        for document in documents.values()
        if document["benchmark"] == "training" and document["link_rate"] is None and "ddp" in by_method(document)
    ]
    step = markdown(
        [
            "",
            *(f"step, {document['world_size']} ranks, {link_name(document)}" for document in limited),
            *(f"loss after {document['rows'][0]['steps']} steps, against `ddp`" for document in compared),
        ],
        (
            [
                f"`{method}`",
                *(
                    f"{1e3 * step_seconds(runs[method]):.0f} ms" if method in runs else ""
                    for runs in map(by_method, limited)
                ),
                *(
                    f"{mean_loss(runs[method]) / mean_loss(runs['ddp']) - 1:+.2%}" if method in runs else ""
                    for runs in map(by_method, compared)
                ),
            ]
            for method in methods
        ),
    )
    pictures = "\n".join(
        f"![{title}](docs/images/{name}.svg)" for name, (title, _, chosen) in PICTURES.items() if chosen(documents)
    )
    commands = "\n\n".join(where(document) for document in [*limited, *compared])
    more = "Kernels, collectives and how all of it was measured: [docs/benchmarks.md](docs/benchmarks.md)."
    return f"{step}\n\n{pictures}\n\n{commands}\n\n{more}"


def page_text(page: str, documents: dict[str, Document]) -> str:
    """``page`` with every generated part made anew."""
    made = {name: section(name, documents) for name in SECTIONS} | {"results": summary(documents)}

    def replace(match: re.Match[str]) -> str:
        if match[1] not in made:
            raise ValueError(f"no generated part is called {match[1]!r}; there are {', '.join(made)}")
        return f"<!-- begin: {match[1]} -->\n{made[match[1]]}\n<!-- end: {match[1]} -->"

    return re.sub(r"<!-- begin: (\w+) -->\n.*?<!-- end: \1 -->", replace, page, flags=re.DOTALL)


# ---- pictures ------------------------------------------------------------------------------------------------------


def limited_trainings(documents: dict[str, Document]) -> list[Document]:
    return [d for d in documents.values() if d["benchmark"] == "training" and d["link_rate"] not in (None, "none")]


def limited_collectives(documents: dict[str, Document]) -> list[Document]:
    return [d for d in documents.values() if d["benchmark"] == "collectives" and d["link_rate"] not in (None, "none")]


def draw_training(documents: list[Document], path: Path, digest: str) -> None:
    """Bars of the step's time for each method and link: the computation alone, and what comes on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 4.5 * len(documents)), 3.2), layout="constrained")
    for axes, document in zip(figure.subplots(1, len(documents), squeeze=False)[0], documents, strict=True):
        runs = by_method(document)
        step = [1e3 * step_seconds(of) for of in runs.values()]
        compute = [1e3 * statistics.median(run["compute_seconds"]["median"] for run in of) for of in runs.values()]
        # The whole bar is the step, also where noise makes the computation alone look longer.
        compute = [min(whole, part) for whole, part in zip(step, compute, strict=True)]
        exposed = [whole - part for whole, part in zip(step, compute, strict=True)]
        places = range(len(runs))
        axes.barh(places, compute, color="#9aa5b1", label="computation")
        axes.barh(places, exposed, left=compute, color="#c2410c", label="communication and compression")
        axes.set_yticks(places, list(runs))
        axes.invert_yaxis()
        axes.set_xlabel("ms per step")
        axes.set_title(f"{document['world_size']} ranks, {link_name(document)}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    write(figure, path, digest)


def draw_collectives(documents: list[Document], path: Path, digest: str) -> None:
    """Lines of all_reduce's speed-up over torch's against the size of the tensor, for each codec and link."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(max(6.0, 4.5 * len(documents)), 3.2), layout="constrained")
    for axes, document in zip(figure.subplots(1, len(documents), squeeze=False)[0], documents, strict=True):
        rows = [row for row in document["rows"] if row["collective"] == "all_reduce"]
        for codec in dict.fromkeys(row["codec"] for row in rows):
            of_codec = [row for row in rows if row["codec"] == codec]
            axes.plot(
                [row["nbytes"] / 2**20 for row in of_codec],
                [row["speedup"] for row in of_codec],
                "o-",
                ms=3,
                label=codec,
            )
        axes.axhline(1, color="black", lw=0.5)
        for scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
            scale("log", base=2)
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("MiB of fp32")
        axes.set_ylabel("times torch's speed")
        axes.set_title(f"all_reduce, {document['world_size']} ranks, {link_name(document)}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    write(figure, path, digest)


def write(figure: Any, path: Path, digest: str) -> None:
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "smallreduce"  # the same picture gives the same file
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": digest})


PICTURES: dict[str, tuple[str, Callable[[list[Document], Path, str], None], Callable[..., list[Document]]]] = {
    "training": ("time of a training step", draw_training, limited_trainings),
    "collectives": ("speed-up of all_reduce", draw_collectives, limited_collectives),
}


def digest_of(documents: list[Document]) -> str:
    """Names the results that a picture was drawn from; the picture carries it."""
    return "sha256:" + hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the tables and write nothing")
    args = parser.parse_args()
    documents = load()
    if args.print:
        print("\n\n".join(f"## {name}\n\n{section(name, documents)}" for name in SECTIONS))
        return
    for path in PAGES:
        path.write_text(page_text(path.read_text(), documents))
    for name, (_, draw, chosen) in PICTURES.items():
        if drawn := chosen(documents):
            draw(drawn, IMAGES / f"{name}.svg", digest_of(drawn))


if __name__ == "__main__":
    main()
