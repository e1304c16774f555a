#!/usr/bin/env python3
r"""Split learning: this machine trains the first layers, another one the rest, and little travels between them.

Both halves as two processes on this machine, Fashion-MNIST, 99 % of the activations in 2 bits:

    python examples/split_learning.py --demo

(`make split` runs that and the same without compression, and compares them.) On two machines; the arguments
for the model and the compressor must be the same, and the two sides say so if they are not:

    gcompress split certificates --out certificates --hosts 192.0.2.7
    python examples/split_learning.py --role server --arch vgg19_cifar10 --cutlayer deep --compressor ms \
        --ratio 0.99 --bit 2 --server_ip 0.0.0.0 --server_port 50051 --certificates certificates
    python examples/split_learning.py --role client --arch vgg19_cifar10 --cutlayer deep --compressor ms \
        --ratio 0.99 --bit 2 --server_ip 192.0.2.7 --server_port 50051 --certificates certificates --path cifar

Compressors of the activations: ms is mask:sparsity=RATIO,bits=BIT,signed=false, sp topk:sparsity=RATIO,
qu quantize:bits=BIT, and none. Their gradients come back in 4 bits, or as they are with none. --up and --down take
any compressor's spec instead. Kill a half that has --checkpoint at any moment and start it again with the same
arguments and --resume: both go on from the last step that both have saved.

In a training script of your own this is three lines: look for "split." below.
"""

import argparse
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import torch

try:
    import gcompress
    from gcompress import split
except ImportError as error:
    sys.exit(f"split_learning.py: error: {error}; `make setup` installs what is needed into .venv")

import image_data
import split_data
import split_report
from split_models import ARCHS

DEMO_GRACE_SECONDS = 60


def build_parser():
    parser = argparse.ArgumentParser(
        prog="split_learning.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("who").add_argument
    add("--role", choices=("client", "server"), help="this machine's half")
    add("--demo", action="store_true", help="both halves, as two processes on this machine")
    add("--server_ip", default="127.0.0.1", help="where the server listens (%(default)s)")
    add("--server_port", type=int, default=50051, help="default: %(default)s; with --demo a free one")
    add("--client_ip", help="ignored: the client listens nowhere")
    add("--client_port", help="ignored")
    add("--server_device", default="cpu", help="default: %(default)s")
    add("--client_device", default="cpu", help="default: %(default)s")

    add = parser.add_argument_group("model, data and training").add_argument
    add("--arch", choices=ARCHS, default="cnn_fashion", help="default: %(default)s")
    add("--cutlayer", choices=("shallow", "medium", "deep"), default="medium", help="default: %(default)s")
    add("--path", help="folder of the data set; for ImageNet one with train/ and val/")
    add("--batch_size", type=int, help="default: the arch's")
    add("--epochs", type=int, help="default: the arch's")
    add("--lr", type=float, help="learning rate of both halves; default: the arch's")
    add("--seed", type=int, default=1, help="of initial weights and batches (%(default)s)")
    add("--evaluations", type=int, default=1, metavar="N", help="on the test images, in each epoch (%(default)s)")
    add("--limit-train", type=int, metavar="N", help="use N training images only")
    add("--limit-test", type=int, metavar="N", help="use N test images only")
    add("--workers", type=int, default=0, help="processes that read an image folder (%(default)s)")
    add("--threads", type=int, help="of torch; default: all cores, half of them with --demo")

    add = parser.add_argument_group("compression").add_argument
    add("--compressor", choices=("qu", "sp", "ms", "none"), default="ms", help="of activations (%(default)s)")
    add("--ratio", type=float, default=0.99, help="fraction not kept, for sp and ms (%(default)s)")
    add("--bit", type=int, default=2, help="for qu and ms (%(default)s)")
    add("--up", metavar="SPEC", help="of activations, instead of the three above")
    add("--down", metavar="SPEC", help="of gradients (quantize:bits=4, or none with none)")
    add("--delta", type=int, default=0, metavar="N", help="send changes, remembering N activations on both sides")

    add = parser.add_argument_group("connection").add_argument
    add("--certificates", metavar="DIR", type=pathlib.Path, help="what `gcompress split certificates` wrote there")
    add("--token-file", metavar="FILE", type=pathlib.Path, help="a token: of this client, or known to the server")
    add("--insecure", action="store_true", help="plaintext, or unknown clients, beyond this machine")
    add("--name", default="client", help="of this client (%(default)s)")
    add("--deadline", type=float, default=60.0, help="seconds of silence that end a connection (%(default)s)")
    add("--patience", type=float, default=300.0, help="seconds to wait for a lost server (%(default)s)")

    add = parser.add_argument_group("results").add_argument
    add("--checkpoint", metavar="DIR", type=pathlib.Path, help="save this half there, DIR/client or DIR/server")
    add("--save-every", type=int, default=200, metavar="N", help="steps between them (%(default)s), and each epoch")
    add("--resume", action="store_true", help="go on from --checkpoint DIR")
    add("--log-file", metavar="FILE", type=pathlib.Path, help="JSON lines (runs/split-ROLE.jsonl)")
    add("--plot", metavar="FILE", type=pathlib.Path, help="draw accuracy against bytes")
    add("--compare", metavar="FILE", nargs="+", default=[], type=pathlib.Path, help="logs of other clients' runs")
    add("--progress", choices=("auto", "bar", "lines"), default="auto", help="auto: a bar if on a terminal")
    return parser


def parse_arguments(argv=None):
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.demo == bool(arguments.role):
        parser.error("expected --role client, --role server or --demo")
    if arguments.resume and not arguments.checkpoint:
        parser.error("--resume needs --checkpoint DIR to resume from")
    for name in ("epochs", "batch_size", "limit_train", "limit_test", "save_every", "threads", "evaluations"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(arguments, name)}, expected 1 or more")
    arguments.log_file = arguments.log_file or pathlib.Path(f"runs/split-{arguments.role}.jsonl")
    return arguments


def specs(arguments):
    """(up, down): what the original's arguments, or --up and --down, stand for."""
    ups = {
        "none": "none",
        "qu": f"quantize:bits={arguments.bit}",
        "sp": f"topk:sparsity={arguments.ratio}",
        # Behind a ReLU nothing is negative, and the paper's unsigned form has one level more. Changes have signs.
        "ms": f"mask:sparsity={arguments.ratio},bits={arguments.bit}" + ("" if arguments.delta else ",signed=false"),
    }
    up = arguments.up or ups[arguments.compressor]
    return up, arguments.down or ("none" if up == "none" else "quantize:bits=4")


class Setting:
    """What both roles make of the arguments alike."""

    def __init__(self, arguments):
        arch = ARCHS[arguments.arch]
        changes = {"epochs": arguments.epochs, "batch_size": arguments.batch_size, "learning_rate": arguments.lr}
        self.arch = dataclasses.replace(arch, **{name: value for name, value in changes.items() if value is not None})
        torch.manual_seed(arguments.seed)
        self.head, self.tail = split.cut(self.arch.build(), self.arch.cuts[arguments.cutlayer])
        self.shape = split.activation_shape(self.head, self.arch.image_shape)
        up, down = specs(arguments)
        largest = max(self.arch.batch_size, split_data.TEST_BATCH)
        self.agreement = {"up": up, "down": down, "shape": self.shape, "labels": "int16", "max_batch": largest}
        if arguments.delta:
            self.agreement["delta_samples"] = arguments.delta
        self.title = (
            f"{arguments.arch}, cut {arguments.cutlayer} ({'x'.join(map(str, self.shape))}), up {up}, down {down}"
        )


def certificates(arguments, name):
    """Keyword arguments for `Link` and `SplitServer.listen`."""
    folder = arguments.certificates
    if folder is None:
        return {"insecure": arguments.insecure}
    files = {"ca": folder / "ca.pem", "certificate": folder / f"{name}.pem", "key": folder / f"{name}.key"}
    return {"insecure": arguments.insecure, **files}


def token(arguments):
    return arguments.token_file.read_text().strip() if arguments.token_file else None


def serve(arguments):
    """The server's role: until the client has finished."""
    setting = Setting(arguments)
    log = split_report.Log(arguments.log_file, arguments.resume)
    report = split_report.ServerReport(setting.title, arguments, log)
    server = split.SplitServer(
        setting.tail.to(arguments.server_device),
        optimizer=setting.arch.optimizer,
        scheduler=setting.arch.scheduler,
        seed=arguments.seed,
        checkpoints=arguments.checkpoint / "server" if arguments.checkpoint else None,
        on_step=report.on_step,
        on_epoch=lambda name, step: report.on_epoch(step, server),
        deadline=arguments.deadline,
        **setting.agreement,
    )
    options = certificates(arguments, "server")
    known = token(arguments)
    if known is not None and arguments.certificates:
        options["ca"] = None  # clients are known by token
    host = f"[{arguments.server_ip}]" if ":" in arguments.server_ip else arguments.server_ip
    tokens = None if known is None else {arguments.name: known}  # an empty one is refused, not taken for none
    with server:
        port = server.listen(f"{host}:{arguments.server_port}", tokens=tokens, clients=1, **options)
        print(f"server: {setting.title}, listening at {host}:{port}", flush=True)
        while not server.wait(1.0):  # in pieces, so that an interrupt is heard
            pass
        report.finish(server)
    log.close()


class Training:
    """The client's role: its half, its data, how far it has come."""

    def __init__(self, arguments):
        self.arguments, self.setting = arguments, Setting(arguments)
        arch = self.setting.arch
        limits = (arguments.limit_train, arguments.limit_test)
        self.data = split_data.load(
            arch, arguments.path, arch.batch_size, arguments.seed, *limits, workers=arguments.workers
        )
        host = f"[{arguments.server_ip}]" if ":" in arguments.server_ip else arguments.server_ip
        files = certificates(arguments, arguments.name)
        if token(arguments) is not None and arguments.certificates:
            files.update(certificate=None, key=None)
        self.link = split.Link(
            f"{host}:{arguments.server_port}",
            token=token(arguments),
            name=arguments.name,
            deadline=arguments.deadline,
            patience=arguments.patience,
            **files,
        )
        self.device = arguments.client_device
        self.client = split.SplitClient(self.setting.head.to(self.device), self.link, **self.setting.agreement)
        self.optimizer = arch.optimizer(self.client.parameters())
        self.scheduler = arch.scheduler(self.optimizer)
        self.history = split_report.History()
        if arguments.checkpoint:
            kept = {"optimizer": self.optimizer, "scheduler": self.scheduler, "history": self.history}
            self.client.keep(arguments.checkpoint / "client", resume=arguments.resume, **kept)
        self.total = arch.epochs * self.data.steps_per_epoch
        self.log = split_report.Log(arguments.log_file)

    def run(self):
        step = self.client.connect()
        parameters = sum(parameter.numel() for parameter in self.client.parameters())
        print(f"client: {self.setting.title}, {parameters} parameters here, from step {step}", flush=True)
        self.history.start(self.client)
        while step < self.total:
            try:
                while step < self.total:
                    step = self.run_stretch(step)
            except gcompress.RolledBack as back:
                print(f"client: the server was lost; {back}", flush=True)
                step = back.step
                self.history.start(self.client)
        self.log.rewrite(self.history.curve)
        try:
            self.client.finish()
        except gcompress.RolledBack:
            self.client.finish()
        return self.history.curve

    def run_stretch(self, step):
        """Train up to the next evaluation, and do that; returns the step after it."""
        whole, parts = self.data.steps_per_epoch, self.arguments.evaluations
        epoch, first = divmod(step, whole)
        last = next(end for end in (whole * part // parts for part in range(1, parts + 1)) if end > first)
        self.client.train()
        with split_report.bar(self, epoch, first) as bar:
            for images, labels, ids in self.data.train_batches(epoch, first, last):
                self.train_step(images.to(self.device), labels, ids)
                bar.update()
                if not bar.disable:
                    bar.set_postfix_str(self.history.progress_text(), refresh=False)
                if self.arguments.checkpoint and self.client.step % self.arguments.save_every == 0:
                    self.history.count(self.client)
                    self.client.save()
        self.history.count(self.client)
        if last == whole:
            self.client.end_epoch()
            self.scheduler.step()
        self.client.eval()
        test = [self.client.evaluate(images.to(self.device), labels) for images, labels in self.data.test_batches()]
        record = self.history.end_stretch(self, epoch + last / whole, test)
        self.log.rewrite(self.history.curve)
        print(split_report.epoch_line(record, self.setting.arch.epochs), flush=True)
        if self.arguments.checkpoint:
            self.client.save()
        return self.client.step

    def train_step(self, images, labels, ids):
        torch.manual_seed(self.arguments.seed * 1_000_003 + self.client.step)  # a step done again draws the same
        self.optimizer.zero_grad()
        loss = self.client(images, labels, ids=ids)
        loss.backward()
        self.optimizer.step()
        self.history.add(self.client.stats)


def train(arguments):
    """The client's role, and what is shown of it at the end."""
    compared = [split_report.read_log(path) for path in arguments.compare]
    training = Training(arguments)
    curve = training.run()
    print(f"\n{split_report.table(curve[-1], [other[-1] for other in compared])}", flush=True)
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        split_report.plot(arguments.plot, [curve, *compared], f"{arguments.arch}, cut {arguments.cutlayer}")
        print(f"plot: {arguments.plot}", flush=True)


def demo(arguments, argv):
    """Both roles as processes; when one fails, the other is ended."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shared = [part for part in argv if part != "--demo"]
    shared += ["--server_ip", "127.0.0.1", "--server_port", str(port)]
    # Halves that share a machine share its cores; with a thread per core each, they would wait for each other.
    shared += [] if arguments.threads else ["--threads", str(max(1, cores() // 2))]
    command = [sys.executable, os.path.abspath(__file__), *shared, "--role"]
    server_log = ["--log-file", str(pathlib.Path(arguments.log_file).with_suffix(".server.jsonl"))]
    processes = {"server": subprocess.Popen([*command, "server", *server_log])}
    client_log = ["--log-file", str(arguments.log_file)] if "--log-file" not in argv else []
    processes["client"] = subprocess.Popen([*command, "client", *client_log])
    try:
        return wait_for(processes)
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(DEMO_GRACE_SECONDS)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def wait_for(processes):
    """The client's exit code, or that of the half that failed first."""
    while True:
        for name, process in processes.items():
            code = process.poll()
            if code:
                print(f"split_learning.py: the {name} ended with code {code}", file=sys.stderr)
                return code
        if all(process.poll() == 0 for process in processes.values()):
            return 0
        time.sleep(0.05)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    if arguments.demo:
        arguments.log_file = pathlib.Path("runs/split.jsonl") if "--log-file" not in argv else arguments.log_file
        return demo(arguments, argv)
    torch.set_num_threads(arguments.threads or cores())
    try:
        (serve if arguments.role == "server" else train)(arguments)
    except (gcompress.GcompressError, image_data.DataError, OSError, ValueError) as error:
        print(f"split_learning.py: {arguments.role}: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
