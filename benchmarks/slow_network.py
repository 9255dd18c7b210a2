"""Runs a command on every rank of a cluster with slow links, simulated on one machine.

    python benchmarks/slow_network.py --ranks 4 --rate 1gbit -- python benchmarks/training.py --steps 20
    python benchmarks/slow_network.py --ranks 2 --rate 100mbit --check

Every node (``--ranks-per-node`` ranks, 1 by default) is a network namespace with one link to a common bridge;
token-bucket filters (``tbf``) limit the link to ``--rate`` in both directions. The command is started once per rank
with the environment that torchrun sets. When a rank fails, the others are ended and its status is returned. Rank 0 has
the terminal; what another rank wrote is shown when it fails. At the end the bytes that each node put on its link are
printed.

All of it lives in private network, mount and PID namespaces, which the kernel takes down with the last process, so that
nothing is left behind however the program ends, and the machine's own network is never touched. Linux only, with ``ip``
and ``tc`` (iproute2), ``unshare`` and ``setpriv`` (util-linux); root, or a kernel that lets users make namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

INTERFACE = "eth0"  # of every node, in its own namespace
MASTER_PORT = 29500  # always free: the namespace is new
BURST_SECONDS = 2e-3
MIN_BURST_BYTES = 256 * 1024  # above the 64 KiB that TCP segmentation offload hands down in one piece
QUEUE_LATENCY = "50ms"
GRACE_SECONDS = 5  # between SIGTERM and SIGKILL for the other ranks of one that failed
RATE_ENV = "SLOW_NETWORK_RATE"
RANKS_PER_NODE_ENV = "SLOW_NETWORK_RANKS_PER_NODE"
# Ethernet (14), IP (20) and TCP with time stamps (32) on segments of 1448 bytes leave 95.6 % of the rate
# to the payload; the bucket's burst comes on top, and a processor that lends two ranks one core takes a little away.
GOODPUT_BOUNDS = (0.85, 1.0)


def parse_rate(text: str) -> float | None:
    """Bits per second of ``100mbit``, ``1gbit``, ...; None for ``none`` (no limit)."""
    if text == "none":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(k|m|g)bit", text)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"a rate looks like 100mbit, 1gbit or none, got {text!r}")
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def tool(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        package = "iproute2" if name in ("ip", "tc") else "util-linux"
        raise SystemExit(f"slow_network.py needs {name!r}, which is not installed (package {package})")
    return path


def ip(*arguments: str) -> str:
    return subprocess.run([tool("ip"), *arguments], check=True, text=True, stdout=subprocess.PIPE).stdout


def address(node: int) -> str:
    return f"10.0.{node // 250}.{node % 250 + 1}"


def build(nodes: int, rate: float | None) -> None:
    """Makes the bridge in the present (private) namespace, and a namespace with a limited link to it for each node."""
    ip("link", "add", "bridge", "type", "bridge")
    ip("link", "set", "bridge", "up")
    for node in range(nodes):
        name, port = f"node{node}", f"port{node}"
        ip("netns", "add", name)
        ip("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
        ip("link", "set", port, "master", "bridge", "up")
        ip("-n", name, "address", "add", f"{address(node)}/16", "dev", INTERFACE)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", INTERFACE, "up")
        if rate is not None:
            # A filter limits what leaves a device: the node's end limits its sending, the bridge's end its receiving.
            burst_bytes = max(MIN_BURST_BYTES, int(rate / 8 * BURST_SECONDS))
            limit = ["tbf", "rate", f"{rate:.0f}bit", "burst", str(burst_bytes), "latency", QUEUE_LATENCY]
            subprocess.run([tool("tc"), "qdisc", "replace", "dev", port, "root", *limit], check=True)
            subprocess.run([tool("tc"), "-n", name, "qdisc", "replace", "dev", INTERFACE, "root", *limit], check=True)


def wire_bytes(nodes: int) -> list[int]:
    """Bytes that each node has sent over its link, Ethernet headers included: what the bridge's end received."""
    links = {link["ifname"]: link for link in json.loads(ip("-s", "-j", "link", "show"))}
    return [links[f"port{node}"]["stats64"]["rx"]["bytes"] for node in range(nodes)]


def rank_environment(rank: int, ranks: int, ranks_per_node: int, rate: str) -> dict[str, str]:
    node, local_rank = divmod(rank, ranks_per_node)
    nodes = -(-ranks // ranks_per_node)
    local_world_size = min(ranks_per_node, ranks - node * ranks_per_node)
    torchrun = {
        "RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_world_size,
        "GROUP_RANK": node,
        "GROUP_WORLD_SIZE": nodes,
        "MASTER_ADDR": address(0),
        "MASTER_PORT": MASTER_PORT,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        RATE_ENV: rate,
        RANKS_PER_NODE_ENV: ranks_per_node,
    }
    return {"OMP_NUM_THREADS": "1", **os.environ, **{name: str(value) for name, value in torchrun.items()}}


def executable(command: list[str]) -> list[str]:
    """``script.py ...`` and ``python ...`` run under this interpreter, as under torchrun."""
    if Path(command[0]).name in ("torchrun", "mpirun"):
        raise SystemExit(f"give the command of one rank: slow_network.py takes the place of {command[0]}")
    if command[0].endswith(".py"):
        return [sys.executable, *command]
    if command[0] in ("python", "python3"):
        return [sys.executable, *command[1:]]
    return command


def run_ranks(command: list[str], ranks: int, ranks_per_node: int, rate: str) -> int:
    """Starts one process per rank, waits for all, and ends the rest when one fails; returns the first status
    that is not 0."""
    with tempfile.TemporaryDirectory(dir="/run") as folder:  # the private /run: gone with the namespaces
        logs = [Path(folder) / f"rank{rank}" for rank in range(ranks)]
        processes: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
        for rank in range(ranks):
            node = f"node{rank // ranks_per_node}"
            output = None if rank == 0 else logs[rank].open("wb")
            process = subprocess.Popen(
                [tool("ip"), "netns", "exec", node, *command],
                env=rank_environment(rank, ranks, ranks_per_node, rate),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            processes[process.pid] = (rank, process)
            if output is not None:
                output.close()

        failed: int | None = None
        while processes:
            # As process 1 of the PID namespace this one also inherits, and reaps, orphans of the ranks.
            pid, wait_status = os.waitpid(-1, 0)
            if pid not in processes:
                continue
            rank, _ = processes.pop(pid)
            status = os.waitstatus_to_exitcode(wait_status)
            if status == 0 or failed is not None:  # those that were ended below do not count
                continue
            failed = 128 - status if status < 0 else status
            print(f"slow_network.py: rank {rank} ended with status {failed}", file=sys.stderr)
            if rank != 0:
                sys.stderr.write(logs[rank].read_text(errors="replace"))
            end_all(list(processes))
        return failed or 0


def end_all(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    # Whatever is still there after a while goes at once: -1 is all of this PID namespace but process 1.
    signal.signal(signal.SIGALRM, lambda *_: os.kill(-1, signal.SIGKILL))
    signal.alarm(GRACE_SECONDS)


def run_inside(arguments: argparse.Namespace, command: list[str]) -> int:
    """The part that runs in the private namespaces, as their process 1."""
    # `ip netns` keeps its names in /run, where they must not meet those of the machine.
    subprocess.run([tool("mount"), "-t", "tmpfs", "tmpfs", "/run"], check=True)
    nodes = -(-arguments.ranks // arguments.ranks_per_node)
    # c10d looks up the names of its peers; without any it warns and, with a name server out of reach, waits.
    hosts = Path("/run/hosts")
    addresses = [(address(node), f"node{node}") for node in range(nodes)]
    addresses += [(f"::ffff:{ipv4}", name) for ipv4, name in addresses]  # as TCPStore's sockets see them
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{host} {name}\n" for host, name in addresses))
    subprocess.run([tool("mount"), "--bind", str(hosts), "/etc/hosts"], check=True)
    build(nodes, parse_rate(arguments.rate))
    start = time.perf_counter()
    status = run_ranks(command, arguments.ranks, arguments.ranks_per_node, arguments.rate)
    seconds = time.perf_counter() - start
    sent = wire_bytes(nodes)
    figures = ", ".join(f"{nbytes / 1e6:.1f}" for nbytes in sent)
    print(f"slow_network.py: {arguments.rate}, {seconds:.1f} s; MB sent by each node: {figures}", file=sys.stderr)
    return status


def run_outside() -> int:
    """Starts this program again in namespaces of its own, and takes them down whatever happens."""
    for name in ("ip", "tc", "mount"):
        tool(name)
    unshare = [tool("unshare"), "--net", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
    if os.geteuid() != 0:
        unshare += ["--user", "--map-root-user"]
    if subprocess.run([*unshare, "true"], stderr=subprocess.DEVNULL).returncode != 0:
        raise SystemExit(
            "slow_network.py may not make network namespaces here: run it as root, or where the kernel lets users do so"
        )

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signal_number)

    signal.signal(signal.SIGTERM, stop)
    # The end of `unshare` ends process 1 of its PID namespace, and that all others; its parent's end ends `unshare`.
    child = subprocess.Popen(
        [tool("setpriv"), "--pdeathsig", "KILL", *unshare, sys.executable, __file__, "--inside", *sys.argv[1:]]
    )
    try:
        return child.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        child.kill()
        child.wait()


def check(arguments: argparse.Namespace) -> None:
    """One rank of ``--check``: compares the goodput of torch's own all_reduce with the rate of the link."""
    import torch
    import torch.distributed as dist

    from measurement import collective_seconds

    dist.init_process_group("gloo")
    rate = parse_rate(arguments.rate)
    world_size = dist.get_world_size()
    ring = 2 * (world_size - 1) / world_size  # what each rank sends, in units of the tensor
    # A second of traffic a call: the bucket's burst (2 ms) and the latency then count little.
    nbytes = 64e6 if rate is None else min(64e6, rate / 8 / ring)
    tensor = torch.zeros(int(nbytes) // 4)
    seconds = collective_seconds({"all_reduce": lambda: dist.all_reduce(tensor)}, repeats=3)["all_reduce"]
    goodput = 8 * ring * tensor.nbytes / seconds.median
    if dist.get_rank() == 0:
        message = f"all_reduce of {tensor.nbytes / 1e6:.0f} MB on {world_size} ranks: {goodput / 1e9:.3f} Gb/s per link"
        print(message + (f", {goodput / rate:.1%} of {arguments.rate}" if rate else ""))
    dist.destroy_process_group()
    if rate is not None and arguments.ranks_per_node == 1:
        low, high = GOODPUT_BOUNDS
        if not low <= goodput / rate <= high:
            raise SystemExit(f"the goodput is {goodput / rate:.1%} of the rate, expected {low:.0%} to {high:.0%}")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--rate", default="1gbit", help="of each link, each way: 100mbit, 1gbit, ..., none")
    parser.add_argument("--check", action="store_true", help="instead of a command, measure torch's own all_reduce")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    arguments = parser.parse_args()
    try:
        parse_rate(arguments.rate)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if arguments.ranks < 1 or arguments.ranks_per_node < 1:
        parser.error("--ranks and --ranks-per-node are at least 1")
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if arguments.check == bool(command) and not arguments.check_rank:
        parser.error("give either a command after -- or --check")
    if arguments.check:
        command = [sys.executable, __file__, "--check-rank", "--ranks", str(arguments.ranks)]
        command += ["--ranks-per-node", str(arguments.ranks_per_node), "--rate", arguments.rate]
    return arguments, command


def main() -> int:
    arguments, command = parse_arguments()
    if arguments.check_rank:
        check(arguments)
        return 0
    command = executable(command)
    return run_inside(arguments, command) if arguments.inside else run_outside()


if __name__ == "__main__":
    sys.exit(main())
