#!/usr/bin/env python3
"""Run a command with torchrun on two nodes that are network namespaces, joined by one link (Linux, root).

    python tools/two_nodes.py --rate 100mbit --ranks 2 -- examples/train.py --engine ddp

Ranks of a node reach each other without that link. /sys/class/net/LINK/statistics/tx_bytes, where LINK is what a
rank finds in GLOO_SOCKET_IFNAME, counts exactly what leaves its node. Without --rate only the counting is had.
"""

import argparse
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import slow_link

ADDRESSES = "10.251.0.1", "10.251.0.2"
PORT = 29611


class Node:
    """A namespace with one end of the link."""

    def __init__(self, number):
        self.number, self.name = number, f"gcompress-{os.getpid()}-{number}"
        self.link, self.address = f"gc{os.getpid()}-{number}"[:15], ADDRESSES[number]
        self.enter = ["ip", "netns", "exec", self.name]

    def counted(self):
        """Bytes that have left the node."""
        command = [*self.enter, "cat", f"/sys/class/net/{self.link}/statistics/tx_bytes"]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@contextlib.contextmanager
def joined_nodes(rate=None):
    """Two Nodes joined by a link of the given rate each way (tc's notation)."""
    nodes, made = [Node(0), Node(1)], []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time-out must not leave the namespaces behind
    try:
        for node in nodes:
            subprocess.run(["ip", "netns", "add", node.name], check=True)
            made.append(node)
        ends = [word for node in nodes for word in ("peer", "name", node.link, "netns", node.name)]
        subprocess.run(["ip", "link", "add", *ends[1:5], "type", "veth", *ends[5:]], check=True)
        for node in nodes:
            for command in (
                ["ip", "link", "set", "lo", "up"],
                ["ip", "address", "add", f"{node.address}/24", "dev", node.link],
                ["ip", "link", "set", node.link, "up"],
            ):
                subprocess.run([*node.enter, *command], check=True)
            if rate:
                limit = ["tbf", "rate", rate, "burst", "512kb", "latency", "200ms"]
                subprocess.run([*node.enter, "tc", "qdisc", "replace", "dev", node.link, "root", *limit], check=True)
        yield nodes
    finally:
        for node in made:
            subprocess.run(["ip", "netns", "delete", node.name], check=True)


def torchrun(nodes, ranks, arguments, seconds, *, capture=True, **environment):
    """Run a Python script or module on `ranks` ranks of each node; returns [(exit code, output) of each node].

    Args:
        nodes: from `joined_nodes`.
        arguments: of torchrun's: what to run.
        seconds: after which all is ended.
        capture: False: show the output as it comes instead of returning it.
        environment: further variables.
    """
    running = []
    for node in nodes:
        command = [*node.enter, sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(nodes)}"]
        command += [f"--node-rank={node.number}", f"--nproc-per-node={ranks}", f"--master-addr={nodes[0].address}"]
        command += [f"--master-port={PORT}", f"--local-addr={node.address}", *map(str, arguments)]
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": node.link, "TP_SOCKET_IFNAME": node.link}
        streams = {"stdout": subprocess.PIPE if capture else None, "stderr": subprocess.STDOUT if capture else None}
        streams |= {"text": True, "errors": "replace"}
        cwd = pathlib.Path(__file__).resolve().parent.parent
        running.append(subprocess.Popen(command, env={**os.environ, **own, **environment}, cwd=cwd, **streams))
    deadline, ended = time.monotonic() + seconds, []
    for process in running:
        try:
            output, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # at which torchrun ends its ranks
            output = f"{process.communicate(timeout=60)[0]}\nended after {seconds} s"
        ended.append((process.returncode, output))
    return ended


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", help="of the link, as tc writes it: 100mbit, 1gbit (default: unlimited)")
    parser.add_argument("--ranks", type=int, default=2, help="of each node (default 2)")
    parser.add_argument("--seconds", type=float, default=3600, help="after which all is ended (default 3600)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and what torchrun is to run")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("expected a script or module after --")
    if slow_link.missing():
        sys.exit(f"two_nodes.py: error: {slow_link.missing()}")
    with joined_nodes(arguments.rate) as nodes:
        ended = torchrun(nodes, arguments.ranks, command, arguments.seconds, capture=False)
        for node in nodes:
            print(f"{node.counted():,} bytes left node {node.number}")
    sys.exit(max(abs(code) for code, _ in ended))


if __name__ == "__main__":
    main()
