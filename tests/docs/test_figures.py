"""Every figure in the documentation is that of a committed result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = str(ROOT / "benchmarks")

sys.path.append(FOLDER)  # while it is imported: folders of tests have the names of some of its programs
try:
    import plot
finally:
    sys.path.remove(FOLDER)

RESULTS = plot.load()


@pytest.mark.parametrize("page", plot.PAGES, ids=lambda page: page.name)
def test_page_says_what_the_results_say(page: Path) -> None:
    text = page.read_text()
    assert "<!-- begin: " in text
    assert text == plot.page_text(text, RESULTS), "run python benchmarks/plot.py"


@pytest.mark.parametrize("name", list(plot.PICTURES))
def test_picture_was_drawn_from_the_results(name: str) -> None:
    _, _, chosen = plot.PICTURES[name]
    path = plot.IMAGES / f"{name}.svg"
    documents = chosen(RESULTS)
    assert path.exists() == bool(documents), "run python benchmarks/plot.py"
    if documents:
        assert plot.digest_of(documents) in path.read_text(), "run python benchmarks/plot.py"


@pytest.mark.parametrize("document", list(RESULTS.values()), ids=list(RESULTS))
def test_result_is_whole(document: dict[str, Any]) -> None:
    assert document["commit"] and document["command"].startswith(f"benchmarks/{document['benchmark']}.py")
    assert document["rows"]
    assert sum(row.get("wrong", 0) for row in document["rows"]) == 0
