"""The simulated cluster: what its ranks see, how it ends, and that nothing is left of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from programs import slow_network

PROGRAM = Path(slow_network.__file__)
NEEDED = ("ip", "tc", "unshare", "setpriv", "mount")

missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
if not missing and subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True).returncode:
    missing = ["the right to make network namespaces"]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"this machine lacks {', '.join(missing)}")


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def root_network() -> tuple[set[str], str]:
    ip = slow_network.tool("ip")
    links = json.loads(subprocess.run([ip, "-j", "link", "show"], check=True, capture_output=True).stdout)
    return {link["ifname"] for link in links}, subprocess.run([ip, "netns"], capture_output=True, text=True).stdout


def test_ranks_see_torchruns_environment_and_a_limited_link(tmp_path: Path) -> None:
    before = root_network()
    rank = (
        "import json, os, subprocess, sys; from pathlib import Path;"
        f"show = ['{slow_network.tool('tc')}', 'qdisc', 'show', 'dev', 'eth0'];"
        "link = subprocess.run(show, capture_output=True, text=True).stdout;"
        "Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps([dict(os.environ), link]))"
    )
    process = start(
        "--ranks", "3", "--ranks-per-node", "2", "--rate", "200mbit", "--", "python", "-c", rank, str(tmp_path)
    )
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    environments, links = zip(*(json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)), strict=True)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
    seen = [tuple(int(environment[name]) for name in names) for environment in environments]
    assert seen == [(0, 3, 0, 2, 0, 2), (1, 3, 1, 2, 0, 2), (2, 3, 0, 1, 1, 2)]
    assert {environment["MASTER_ADDR"] for environment in environments} == {"10.0.0.1"}
    assert all("tbf" in link and "rate 200Mbit" in link for link in links)
    assert root_network() == before


def test_torchs_all_reduce_gets_the_rate_of_the_link() -> None:
    process = start("--ranks", "2", "--rate", "100mbit", "--check")
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    assert "of 100mbit" in output


def test_a_failing_rank_ends_the_others_and_is_heard() -> None:
    # Only being ended can end ranks 0 and 2.
    process = start(
        "--ranks", "3", "--", "sh", "-c", "[ $RANK = 1 ] && echo the reason && exit 7; cat /dev/zero > /dev/null"
    )
    _, errors = process.communicate()
    assert process.returncode == 7
    assert "rank 1 ended with status 7\nthe reason" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_survives_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    before = root_network()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # What a shell starts in the background has SIGINT ignored, and hands that on.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start("--ranks", "2", "--", "sh", "-c", f"exec > {fifo}; echo started; cat /dev/zero > /dev/null")
    signal.signal(signal.SIGINT, inherited)
    try:
        with fifo.open() as ranks:
            assert ranks.readline() == "started\n"
            process.send_signal(number)
            ranks.read()  # ends when no process has the other end open any more
        process.communicate()
    finally:
        process.kill()  # if it has not ended
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert root_network() == before


@pytest.mark.parametrize(
    "text, rate", [("none", None), ("100mbit", 1e8), ("1gbit", 1e9), ("2.5gbit", 2.5e9), ("64kbit", 64e3)]
)
def test_rates(text: str, rate: float | None) -> None:
    assert slow_network.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "1", "1gb", "0mbit", "-1mbit", "1 gbit"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="100mbit, 1gbit or none"):
        slow_network.parse_rate(text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks", "2"], "either a command after -- or --check"),
        (["--ranks", "0", "--", "true"], "at least 1"),
        (["--ranks", "2", "--rate", "fast", "--", "true"], "a rate looks like"),
        (["--ranks", "2", "--", "torchrun", "x.py"], "takes the place of torchrun"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], message: str) -> None:
    process = start(*arguments)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert message in errors
