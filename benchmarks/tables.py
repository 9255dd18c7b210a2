"""The tables of the documentation, in Markdown, each made from one committed result. ``plot.py`` puts them in place."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

Document = dict[str, Any]  # one results file
Row = dict[str, Any]

FEWEST_STEPS_FOR_LOSSES = 100


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
    megabytes = ours[0]["uncompressed_nbytes"] / 1e6
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in ours):
        by_codec: dict[str, dict[str, Row]] = {}
        for row in ours:
            if row["dtype"] == dtype:
                by_codec.setdefault(row["codec"], {})[row["operation"]] = row
        parts.append(
            f"{megabytes:.0f} MB of {dtype}, {document['threads']} thread(s): GB/s (and the fraction of a copy)."
        )
        # The operations of a codec, and those of sharded training, of which each has a codec of its own.
        for operations in dict.fromkeys(tuple(rows) for rows in by_codec.values()):
            parts.append(
                markdown(
                    [dtype, *operations],
                    (
                        [f"`{codec}`", *(f"{row['gb_per_s']:.1f} ({row['fraction']:.2f})" for row in rows.values())]
                        for codec, rows in by_codec.items()
                        if tuple(rows) == operations
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


def training_table(document: Document, times_against: str, loss_against: str) -> str:
    """A line for each method; times and bytes are compared with one of them, losses with one."""
    runs = by_method(document)
    first = document["rows"][0]
    seeds = len({run["seed"] for run in document["rows"]})
    plain = runs.get(times_against)
    with_link = first.get("link_nbytes_per_step") is not None
    with_losses = says_losses(document)
    with_times = document["benchmark"] != "sharded" or not with_losses

    def cells(method: str, of_method: list[Row]) -> list[str]:
        losses = [run["validation_loss"] for run in of_method]
        sent = of_method[0]["sent_nbytes_per_step"]
        return [
            f"`{method}`",
            *(time_cells(of_method) if with_times else []),
            f"{sent / 1e6:.3f}",
            "" if plain is None else f"{plain[0]['sent_nbytes_per_step'] / sent:.1f}",
            *([f"{of_method[0]['link_nbytes_per_step'] / 1e6:.3f}"] if with_link else []),
            *(loss_cells(method, losses) if with_losses else []),
            str(sum(run["wrong"] for run in of_method)),
        ]

    def time_cells(of_method: list[Row]) -> list[str]:
        step = step_seconds(of_method)
        low = min(run["step_seconds"]["low"] for run in of_method)
        high = max(run["step_seconds"]["high"] for run in of_method)
        return [
            f"{1e3 * step:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})",
            f"{1e3 * compute_seconds(of_method):.0f}",
            f"{1e3 * exposed_seconds(of_method):.0f}",
            "" if plain is None else f"{step_seconds(plain) / step:.2f}",
        ]

    def loss_cells(method: str, losses: list[float]) -> list[str]:
        mean, extremes = f"{mean_loss(runs[method]):.4f}", f" ({min(losses):.4f}-{max(losses):.4f})"
        # DGC is SGD with momentum, here at AdamW's learning rate: its loss says nothing.
        compared = loss_against in runs and method != "dgc"
        return [
            mean + (extremes if len(losses) > 1 else ""),
            f"{relative_loss(runs, method, loss_against):+.2%}" if compared else "",
        ]

    table = markdown(
        [
            "method",
            *(["step, ms", "compute, ms", "exposed, ms", "speed-up"] if with_times else []), "MB sent", "ratio",
            *(["MB on the link"] if with_link else []),
            *(["validation loss", f"against {loss_against}"] if with_losses else []), "wrong",
        ],
        (cells(method, of_method) for method, of_method in runs.items()),
    )  # fmt: skip
    settings = (
        f"{first['parameters'] / 1e6:.2f} M parameters, {first['steps']} steps, {first['world_size']} ranks, "
        f"{seeds} seed(s), {link_name(document)}."
    )
    return f"{settings}\n\n{table}"


def says_losses(document: Document) -> bool:
    """After the few steps that are timed losses say nothing; and methods that shard, which are many, are not timed over
    the many steps after which they do."""
    return bool(document["rows"][0]["steps"] >= FEWEST_STEPS_FOR_LOSSES)


def training_section(document: Document) -> str:
    runs = by_method(document)
    verdicts = []
    if document["link_rate"] == "100mbit" and {"ddp", "dgc"} <= runs.keys():
        dense, sparse = exposed_seconds(runs["ddp"]), exposed_seconds(runs["dgc"])
        met = "met" if 30 * sparse <= dense else "missed"
        verdicts.append(
            f"`dgc`: {1e3 * sparse:.1f} ms exposed, `ddp` {1e3 * dense:.0f} ms; target a thirtieth ({met})."
        )
    return "\n\n".join([training_table(document, "ddp", "ddp"), *verdicts])


def sharded_section(document: Document) -> str:
    """Times are compared with stock FSDP2, losses with DDP where it was run, and those of FSDP2's compressed forms, and
    of ragged sharding, with stock FSDP2."""
    runs = by_method(document)
    verdicts = []
    if says_losses(document):
        verdicts = list(sharded_loss_verdicts(runs))
    elif document["link_rate"] in (None, "none"):
        verdicts = list(loopback_verdicts(runs))
    elif "fsdp2" in runs:
        share = compute_seconds(runs["fsdp2"]) / step_seconds(runs["fsdp2"])
        for method in compressing(runs):
            times = step_seconds(runs["fsdp2"]) / step_seconds(runs[method])
            verdicts.append(
                f"`{method}`: {times:.1f} times as fast as `fsdp2`, "
                + (f"target 4 ({'met' if times >= 4 else 'missed'})." if share < 0.1 else "no target.")
                + weights_whole(runs, method)
            )
        verdicts = [
            f"Computing takes {share:.1%} of the step of `fsdp2`; the target is for less than a tenth.",
            "\n".join(f"* {verdict}" for verdict in verdicts),
        ]
    loss_against = "ddp" if "ddp" in runs else "fsdp2"
    return "\n\n".join([training_table(document, "fsdp2", loss_against), *verdicts])


def loopback_verdicts(runs: dict[str, list[Row]]) -> Iterable[str]:
    """On what sharding costs where links are fast: ragged sharding is to cost no more than the stock one."""
    lines = []
    for method, stock in (("ragged", "fsdp2"), ("ragged-keep", "fsdp2-keep")):
        if {method, stock} <= runs.keys():
            times = step_seconds(runs[stock]) / step_seconds(runs[method])
            met = "met" if times >= 1 else "missed"
            lines.append(f"* `{method}`: {times:.2f} times as fast as `{stock}`, target 1 ({met}).")
    return ["\n".join(lines)] if lines else []


def weights_whole(runs: dict[str, list[Row]], method: str) -> str:
    """Against the stock method that holds whole weights, too, and the optimizer's state in parts."""
    if method != "sdp4bit" or "zero" not in runs:
        return ""
    times = step_seconds(runs["zero"]) / step_seconds(runs[method])
    return f" {times:.1f} times as fast as `zero`, which holds whole weights, too."


def sharded_loss_verdicts(runs: dict[str, list[Row]]) -> Iterable[str]:
    """On the losses that have a target: of SDP4Bit, of FSDP2's and ragged sharding's compressed forms and of 8-bit
    moments, to be near what does not compress, and of 4-bit weights that are no differences, to be worse."""
    lines = []
    for method in [method for method in runs if method in (*compressing(runs), "ragged-adam8bit")]:
        plain = "fsdp2" if method.startswith(("fsdp2", "ragged")) else "ddp"
        if plain not in runs:
            continue
        by = relative_loss(runs, method, plain)
        of_plain = {run["seed"]: run["validation_loss"] for run in runs[plain]}
        by_seed = [
            run["validation_loss"] / of_plain[run["seed"]] - 1 for run in runs[method] if run["seed"] in of_plain
        ]
        target = ""
        if method == "sdp4bit" or plain == "fsdp2":
            target = f"; target +0.25 % ({'met' if by <= 0.0025 else 'missed'})"
        elif method == "sdp4bit-weights":
            worse = min(run["validation_loss"] for run in runs[method]) > max(of_plain.values())
            target = f"; target: each seed worse than any of `{plain}` ({'met' if worse else 'missed'})"
        seeds = f" ({min(by_seed):+.2%} to {max(by_seed):+.2%} by seed)" if len(by_seed) > 1 else ""
        lines.append(f"* `{method}`: {by:+.2%} of the loss of `{plain}`{seeds}{target}.")
    return ["\n".join(lines)] if lines else []


def compressing(runs: dict[str, list[Row]]) -> list[str]:
    """The methods that shard and compress, in their order."""
    others = ("ddp", "ddp-int4", "zero", "fsdp2", "ragged", "ragged-adam8bit", "sdp4bit-exact")
    return [method for method in runs if method.removesuffix("-keep") not in others]


def memory_section(document: Document) -> str:
    first = document["rows"][0]
    parts = ("weights", "gradients", "optimizer", "feedback", "kept", "computed", "measured")
    table = markdown(
        ["method", *parts, "rest", "against `fsdp2`"],
        (
            [
                f"`{row['method']}`",
                *(f"{row[f'{part}_nbytes'] / 1e6:.1f}" for part in parts),
                f"{(row['measured_nbytes'] - row['computed_nbytes']) / 1e6:.1f}",
                "".join(
                    f"{row['measured_nbytes'] / stock['measured_nbytes']:.2f}"
                    for stock in document["rows"]
                    if stock["method"] == "fsdp2"
                ),
            ]
            for row in document["rows"]
        ),
    )
    return (
        f"{first['parameters'] / 1e6:.2f} M parameters in fp32, {first['world_size']} ranks; MB of a rank.\n\n{table}"
    )


def plans_section(document: Document) -> str:
    rows = document["rows"]
    world_sizes = sorted({row["world_size"] for row in rows})
    of_line: dict[tuple[str, str, int], dict[int, Row]] = {}
    for row in rows:
        of_line.setdefault((row["model"], row["blocked"], row["block_rows"]), {})[row["world_size"]] = row

    def padding(row: Row) -> str:
        padding, bound = (f"{100 * row[name] / row['parameters']:.2f}" for name in ("padding_numel", "bound_numel"))
        return padding if padding == bound else f"{padding} ({bound})"

    table = markdown(
        ["model", "blocks in", "rows of a block", *(f"{world_size} ranks" for world_size in world_sizes)],
        (
            [model, blocked, str(block_rows), *(padding(found[world_size]) for world_size in world_sizes)]
            for (model, blocked, block_rows), found in of_line.items()
        ),
    )
    slowest = max(rows, key=lambda row: row["slowest_seconds"]["median"])
    seconds = slowest["slowest_seconds"]
    lines = [
        f"* The slowest of all these plans of a bucket took {milliseconds(seconds)} ms: a {slowest['slowest_bucket']} "
        f"of {slowest['model']} on {slowest['world_size']} ranks in blocks of {slowest['block_rows']} row(s), in a "
        f"single thread; target 300 ({'met' if seconds['median'] < 0.3 else 'missed'}).",
        *map(brute_force_verdict, document["compared_with_brute_force"]),
    ]
    align = " or ".join(str(align) for align in sorted({row["align"] for row in rows}))
    return (
        f"Elements of padding in all buckets, in % of the parameters; shards are multiples of {align} elements. In "
        f"brackets, where it is less: a bound below which no layout can be.\n\n{table}\n\n" + "\n".join(lines)
    )


def brute_force_verdict(compared: Row) -> str:
    """Planner against brute force."""
    (fewest, most), (least, largest) = compared["tensors"], compared["ranks"]
    share = compared["smallest"] / compared["cases"]
    met = share >= 0.95 and compared["worst_ratio"] <= 2 and compared["wrong"] == 0
    return (
        f"* {compared['cases']} random cases of {fewest} to {most} tensors on {least} to {largest} ranks, against "
        f"brute force: the smallest shards in {share:.2%}, at most {compared['worst_ratio']:.2f} times the smallest; "
        f"target 95 % and 2 ({'met' if met else 'missed'}). In {compared['beyond_equal_parts']} of them no layout has "
        "shards as small as an equal part."
    )


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


def compute_seconds(runs: list[Row]) -> float:
    return float(statistics.median(run["compute_seconds"]["median"] for run in runs))


def mean(runs: list[Row], name: str) -> float:
    return float(statistics.mean(run[name] for run in runs))


def mean_loss(runs: list[Row]) -> float:
    return mean(runs, "validation_loss")


def relative_loss(runs: dict[str, list[Row]], method: str, plain: str) -> float:
    return mean_loss(runs[method]) / mean_loss(runs[plain]) - 1


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
    "sharded": sharded_section,
    "memory": memory_section,
    "plans": plans_section,
}


def section(benchmark: str, documents: dict[str, Document]) -> str:
    """The tables of all results of one benchmark, each with what made it."""
    parts = [
        f"### {name}\n\n{where(document)}\n\n{SECTIONS[benchmark](document)}"
        for name, document in documents.items()
        if document["benchmark"] == benchmark
    ]
    return "\n\n".join(parts) if parts else "Not measured yet."
