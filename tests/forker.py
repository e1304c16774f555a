"""The process whose forks run what quick_python.py is asked for: `python -m tests.forker SOCKET`.

It starts no thread and computes nothing, so that forks are as good as new. It ends, and its forks with it, when its
input does.
"""

import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import types

from tests.quick_python import at_start


def main():
    import torch._dynamo  # noqa: F401 - which torch's optimizers and DistributedDataParallel import

    import gcompress  # noqa: F401

    with contextlib.suppress(ImportError):
        import torchvision  # noqa: F401 - which examples import

    gc.freeze()  # what is there now is never looked at again
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen(64)
    print("ready", flush=True)
    program = serve(listener)
    if program:
        become(*program)


def serve(listener):
    """Fork for all who ask; returns None at the end of the input, and in a fork what it is to run."""
    selector, forks = selectors.DefaultSelector(), {}  # {client: (its fork's pid, the fork's descriptor)}
    selector.register(listener, selectors.EVENT_READ, "asked")
    selector.register(0, selectors.EVENT_READ, "ended")
    while True:
        for key, _ in selector.select():
            if key.data == "ended":
                for pid, _ in forks.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            if key.data == "asked":
                client, _ = listener.accept()
                program = asked_by(client)
                if program is None:
                    client.close()
                    break
                if at_start(program[2]) != at_start(os.environ):
                    answer(client, 0)
                    client.close()
                else:
                    pid = os.fork()
                    if pid == 0:
                        selector.close()
                        for each in (listener, client, *forks):
                            each.close()
                        for _, descriptor in forks.values():
                            os.close(descriptor)
                        return program
                    forks[client] = pid, os.pidfd_open(pid)
                    selector.register(client, selectors.EVENT_READ, "killed")
                    selector.register(forks[client][1], selectors.EVENT_READ, client)
                    answer(client, pid)
                for descriptor in program[3]:
                    os.close(descriptor)
                break  # what else was selected may be gone
            if key.data == "killed":  # the client
                selector.unregister(key.fileobj)
                os.kill(forks[key.fileobj][0], signal.SIGKILL)
                break
            client = key.data
            pid, descriptor = forks.pop(client)
            _, status = os.waitpid(pid, 0)
            selector.unregister(descriptor)
            os.close(descriptor)
            with contextlib.suppress(KeyError):  # it was killed
                selector.unregister(client)
            answer(client, status)
            client.close()
            break


def answer(client, number):
    with contextlib.suppress(OSError):  # it was killed meanwhile
        client.sendall(number.to_bytes(4, "little"))


def asked_by(client):
    """(arguments, folder, environment, descriptors) of a program; None if the client was killed meanwhile."""
    length, descriptors, _, _ = socket.recv_fds(client, 4, 3)
    request, missing = b"", int.from_bytes(length, "little")
    while missing and (part := client.recv(missing)):
        request += part
        missing -= len(part)
    if missing or not request:
        for descriptor in descriptors:
            os.close(descriptor)
        return None
    return *json.loads(request.decode("utf-8", "surrogateescape")), descriptors


def become(arguments, folder, environment, descriptors):
    """Go on as the program: returning ends it, as it ends Python."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-u":
        arguments = arguments[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    kind, *rest = arguments
    if kind == "-m":
        sys.argv, sys.path[0] = rest, folder
        runpy._run_module_as_main(rest[0])
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), vars(program))
    else:
        sys.argv, sys.path[0], program.__file__ = arguments, os.path.dirname(kind), kind
        with open(kind) as file:
            exec(compile(file.read(), kind, "exec"), vars(program))


if __name__ == "__main__":
    main()
