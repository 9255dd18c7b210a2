"""What the documentation tells a reader to type works: its Python runs, its commands exist and take the flags shown."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import smallreduce

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

# Fragments of other programs: what stands around each of them there.
MIGRATING = """
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import smallreduce as sr

dist.init_process_group("gloo")
"""
FRAGMENT = """
model = DistributedDataParallel(torch.nn.Linear(64, 64))
{fragment}
model(torch.randn(8, 64)).square().mean().backward()
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if command := " ".join(shlex.split(line, comments=True)):
                    yield page, command


def printed() -> Iterator[tuple[str, str, str]]:
    """Code that is followed by a block of plain text: what it prints."""
    for page, text in PAGES.items():
        pairs = re.findall(r"^```python\n((?:(?!^```).)*)^```\n+^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        yield from ((page, code, output) for code, output in pairs)


def run_on_two_ranks(program: str, folder: Path) -> None:
    path = folder / "program.py"
    # A rank that ends while a thread of gloo's still holds a tensor aborts; the interpreter waits for no thread.
    path.write_text(program + "\ndist.barrier()\ndist.destroy_process_group()\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*TORCHRUN, path], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/choosing.md", "docs/checkpointing.md", "docs/sdp4bit.md", "docs/fsdp.md", "docs/ragged.md"],
)
def test_page_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    program = "\n".join(blocks(page, "python"))
    assert "init_process_group" in program
    run_on_two_ranks(program, tmp_path)


@pytest.mark.parametrize(("page", "code", "output"), list(printed()), ids=lambda value: value.partition("\n")[0])
def test_code_prints_what_is_shown(page: str, code: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(code, {"sr": smallreduce})
    assert capsys.readouterr().out == output


def test_what_is_printed_is_shown() -> None:
    assert "docs/ragged.md" in {page for page, _, _ in printed()}


def test_fragments_of_migrating_run(tmp_path: Path) -> None:
    fragments = blocks("docs/migrating.md", "python")
    assert fragments
    run_on_two_ranks(MIGRATING + "".join(FRAGMENT.format(fragment=fragment) for fragment in fragments), tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_names_and_arguments_exist(page: str) -> None:
    """Also in fragments that cannot run here, because they belong to a framework."""
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("sr."):
                assert resolve(ast.unparse(node)) is not None
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sr."):
                parameters = inspect.signature(resolve(ast.unparse(node.func))).parameters
                if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                    continue  # it hands them on, as SDP4Bit does to its optimizer
                unknown = {keyword.arg for keyword in node.keywords if keyword.arg is not None} - set(parameters)
                assert not unknown, f"{ast.unparse(node.func)} takes no {unknown}"


def resolve(dotted: str) -> object:
    found: object = smallreduce
    for name in dotted.split(".")[1:]:
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_command_exists(page: str, command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
        return
    if words[:2] == ["pip", "install"]:
        return
    assert words[0] in ("python", "torchrun"), f"{page} shows a command that this test does not know"
    program = next(word for word in words if word.endswith(".py"))
    shown = subprocess.run(
        [sys.executable, ROOT / program, "--help"], capture_output=True, text=True, check=True
    ).stdout
    flags = [word for word in words[words.index(program) :] if word.startswith("--")]
    assert all(re.search(rf"{flag}\b", shown) for flag in flags), f"{command}: not all flags are in\n{shown}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
