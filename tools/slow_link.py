#!/usr/bin/env python3
"""Run a command in a network namespace whose loopback is as slow as a real link (Linux, root).

    python tools/slow_link.py --rate 100mbit -- horovodrun -np 4 python examples/train.py

All ranks then share one link of that rate, and /sys/class/net/lo/statistics/tx_bytes seen
by the command counts exactly what crossed it. Without --rate only the counting is had.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys


def missing():
    """Why a namespace cannot be made here, or None."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} (iproute2) is not installed"
    probe = subprocess.run(["ip", "netns", "add", f"gcompress-probe-{os.getpid()}"], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"this machine allows no network namespace: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", f"gcompress-probe-{os.getpid()}"], check=True)
    return None


@contextlib.contextmanager
def namespace(rate=None):
    """A namespace with a loopback of the given rate (tc's notation); yields the command prefix that enters it."""
    name = f"gcompress-{os.getpid()}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time-out must not leave the namespace behind
    subprocess.run(["ip", "netns", "add", name], check=True)
    enter = ["ip", "netns", "exec", name]
    try:
        subprocess.run([*enter, "ip", "link", "set", "lo", "up"], check=True)
        if rate:
            # The burst must exceed the loopback's MTU of 64 KiB.
            limit = ["tbf", "rate", rate, "burst", "512kb", "latency", "200ms"]
            subprocess.run([*enter, "tc", "qdisc", "replace", "dev", "lo", "root", *limit], check=True)
        yield enter
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", help="of the shared link, as tc writes it: 100mbit, 1gbit (default: unlimited)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command to run")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("expected a command after --")
    if missing():
        sys.exit(f"slow_link.py: error: {missing()}")
    with namespace(arguments.rate) as enter:
        sys.exit(subprocess.run([*enter, *command]).returncode)


if __name__ == "__main__":
    main()
