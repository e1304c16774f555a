"""Start BytePS's scheduler, servers and workers on this machine, and end them together.

    python -m gcompress.plugins.byteps.launch -np 2 --servers 1 python examples/train.py

The command runs once per worker. When a worker or server fails, or is killed, all others are
ended and the exit code is not 0. Over several machines, start the same processes with your
scheduler: BytePS's variables are those of its own documentation, a server or the scheduler is
`python …/gcompress/plugins/byteps/serve.py`.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid

from ..launched import die_with_the_launcher

SERVE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "serve.py")
GRACE_SECONDS = 10  # from a request to end, to force


def free_port():
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environments(workers, servers, folder):
    """(name, environment) of every process."""
    common = {
        **os.environ,
        "DMLC_NUM_WORKER": str(workers),
        "DMLC_NUM_SERVER": str(servers),
        "DMLC_PS_ROOT_URI": "127.0.0.1",
        "DMLC_PS_ROOT_PORT": str(free_port()),
        "DMLC_NODE_HOST": "127.0.0.1",
        "BYTEPS_FORCE_DISTRIBUTED": "1",
        "BYTEPS_JOB": uuid.uuid4().hex[:12],
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    common.setdefault("BYTEPS_SERVER_ENGINE_THREAD", "2")
    common.pop("DMLC_WORKER_ID", None)
    yield "scheduler", {**common, "DMLC_ROLE": "scheduler"}
    for number in range(servers):
        yield f"server {number}", {**common, "DMLC_ROLE": "server"}
    for number in range(workers):
        sockets = os.path.join(folder, str(number))
        os.makedirs(sockets)
        yield (
            f"worker {number}",
            {
                **common,
                "DMLC_ROLE": "worker",
                "DMLC_WORKER_ID": str(number),
                "BYTEPS_LOCAL_RANK": "0",
                "BYTEPS_LOCAL_SIZE": "1",
                "BYTEPS_SOCKET_PATH": sockets,
            },
        )


def run(workers, servers, command):
    """Run `command` on `workers` workers; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="byteps-") as folder, contextlib.ExitStack() as stack:
        processes = {}
        stack.callback(end, processes)
        for name, environment in environments(workers, servers, folder):
            own = command if name.startswith("worker") else [sys.executable, SERVE]
            processes[name] = subprocess.Popen(own, env=environment, preexec_fn=die_with_the_launcher)
        # The scheduler and the servers end by themselves when all workers have.
        while any(process.poll() is None for name, process in processes.items()):
            for name, process in processes.items():
                if process.poll() not in (None, 0):
                    print(
                        f"launch: {name} ended with exit code {process.returncode}: ending the others", file=sys.stderr
                    )
                    return process.returncode if process.returncode > 0 else 128 - process.returncode
            time.sleep(0.05)
    return 0


def end(processes):
    """Ask every process that still runs to end, then force it."""
    alive = [process for process in processes.values() if process.poll() is None]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in alive:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main():
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gcompress.plugins.byteps.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-np", "--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--servers", type=int, default=1, help="default: %(default)s")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what each worker runs")
    arguments = parser.parse_args()
    if arguments.workers < 1 or arguments.servers < 1 or not arguments.command:
        parser.error("expected at least one worker, one server and a command")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(run(arguments.workers, arguments.servers, arguments.command))


if __name__ == "__main__":
    main()
