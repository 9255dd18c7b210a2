"""Turns the committed results into the tables and pictures of the documentation.

    python benchmarks/plot.py           # rewrites README.md, two pages of docs/ and docs/images/
    python benchmarks/plot.py --print   # prints the tables instead

Everything between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->`` in those pages is made here, from the files in
``benchmarks/results/`` and from nothing else, so that every figure has a command, a machine and a commit. A test
compares the pages, and the digests that the pictures carry, with the results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tables import (
    SECTIONS,
    Document,
    by_method,
    compute_seconds,
    link_name,
    markdown,
    relative_loss,
    section,
    step_seconds,
    where,
)

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
IMAGES = REPOSITORY / "docs" / "images"
PAGES = (REPOSITORY / "README.md", REPOSITORY / "docs" / "benchmarks.md", REPOSITORY / "docs" / "ragged.md")


def load(folder: Path = RESULTS) -> dict[str, Document]:
    """All results, by the path of their file below the folder without its suffix, in order of these names."""
    paths = sorted(folder.rglob("*.json"), key=lambda path: path.with_suffix("").parts)
    documents = {path.relative_to(folder).with_suffix("").as_posix(): json.loads(path.read_text()) for path in paths}
    return {name: document for name, document in documents.items() if document.get("benchmark") in SECTIONS}


def summary(documents: dict[str, Document]) -> str:
    """What the README shows: step times on limited links beside losses after equal steps, and the pictures."""
    trainings = limited("training", documents)
    if not trainings:
        return "Nothing yet; [docs/benchmarks.md](docs/benchmarks.md) says how to measure."
    methods = list(dict.fromkeys(method for document in trainings for method in by_method(document)))
    compared = [
        document
        for document in documents.values()
        if document["benchmark"] == "training" and document["link_rate"] is None and "ddp" in by_method(document)
    ]
    step = markdown(
        [
            "",
            *(f"step, {document['world_size']} ranks, {link_name(document)}" for document in trainings),
            *(f"loss after {document['rows'][0]['steps']} steps, against `ddp`" for document in compared),
        ],
        (
            [
                f"`{method}`",
                *(
                    f"{1e3 * step_seconds(runs[method]):.0f} ms" if method in runs else ""
                    for runs in map(by_method, trainings)
                ),
                *(
                    f"{relative_loss(runs, method, 'ddp'):+.2%}" if method in runs else ""
                    for runs in map(by_method, compared)
                ),
            ]
            for method in methods
        ),
    )
    pictures = "\n".join(
        f"![{title}](docs/images/{name}.svg)" for name, (title, _, chosen) in PICTURES.items() if chosen(documents)
    )
    commands = "\n\n".join(where(document) for document in [*trainings, *compared])
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


def limited(benchmark: str, documents: dict[str, Document]) -> list[Document]:
    """The results of a benchmark on limited links."""
    return [d for d in documents.values() if d["benchmark"] == benchmark and d["link_rate"] not in (None, "none")]


def draw_training(documents: list[Document], path: Path, digest: str) -> None:
    """Bars of the step's time for each method and link: the computation alone, and what comes on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 4.5 * len(documents)), 3.2), layout="constrained")
    for axes, document in zip(figure.subplots(1, len(documents), squeeze=False)[0], documents, strict=True):
        runs = by_method(document)
        step = [1e3 * step_seconds(of) for of in runs.values()]
        compute = [1e3 * compute_seconds(of) for of in runs.values()]
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
    "training": ("time of a training step", draw_training, partial(limited, "training")),
    "collectives": ("speed-up of all_reduce", draw_collectives, partial(limited, "collectives")),
    "sharded": ("time of a step of sharded training", draw_training, partial(limited, "sharded")),
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
