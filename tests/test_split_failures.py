"""Errors that nobody meant, at the server: the client is told once and at once, and neither half has taken the step."""

import concurrent.futures
import contextlib
import copy
import errno
import logging
import random
import shutil
import threading
import time

import pytest
import torch

pytest.importorskip("grpc", reason="grpcio is not installed: pip install -e .[split]")

import grpc  # noqa: E402
from torch import nn  # noqa: E402

from gcompress import ConfigError, LinkError, RefusedError, ServerError, split
from gcompress.split import wire  # noqa: E402
from gcompress.split.link import METHOD  # noqa: E402
from gcompress.split.wire import Frame, Kind  # noqa: E402
from tests.nested import same  # noqa: E402
from tests.split_damage import trials  # noqa: E402
from tests.split_tools import (  # noqa: E402
    CLASSES,
    INPUTS,
    WIDTH,
    Proxy,
    Rogue,
    Trainer,
    Trap,
    batch,
    good_body,
    model,
    serving,
    told,
)

DELTA = {"up": "quantize:bits=4", "down": "quantize:bits=4", "delta_samples": 40, "max_batch": 20}


class Fragile(nn.Module):
    """Running statistics, then a trap that is set for one mode or the other."""

    def __init__(self):
        super().__init__()
        self.layers = split.cut(model(), 3)[1]
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.trap, self.evaluating = Trap(), Trap()

    def forward(self, value):
        if self.training:
            self.seen += 1
        outputs = self.layers(value)
        (self.trap if self.training else self.evaluating)()
        return outputs


class FragileSGD(torch.optim.SGD):
    """Changes the weights and its own momentum, then raises."""

    trap = Trap()

    def step(self, closure=None):
        super().step(closure)
        self.trap()


def everything(tail):
    """All that a step changes at the server."""
    return copy.deepcopy([tail.state_dict(), dict(tail.model.named_buffers())])


MODES = {"labels": {}, "delta": DELTA, "u-shaped": {"labels": None}}
PLACES = [(mode, place) for mode in ("labels", "delta") for place in ("model", "loss", "optimizer", "on_step")]
PLACES += [("u-shaped", place) for place in ("model", "optimizer", "on_step")]
ERRORS = (ValueError("more than 1 value, ü\udcff %"), SystemExit(3), KeyError("x" * 100_000), grpc.RpcError("?"))


class Training:
    """Both halves of a model, with traps wherever an error can come from."""

    def __init__(self, mode):
        self.mode, self.tail = mode, Fragile()
        optimizer = type("ItsSGD", (FragileSGD,), {"trap": Trap()})
        loss, on_step = Trap(nn.functional.cross_entropy), Trap()
        self.traps = {"model": self.tail.trap, "loss": loss, "optimizer": optimizer.trap, "on_step": on_step}
        self.server = split.SplitServer(
            self.tail,
            optimizer=lambda parameters: optimizer(parameters, lr=0.05, momentum=0.9),
            loss=loss,
            on_step=on_step,
            shape=(WIDTH,),
            **MODES[mode],
        )
        self.port = self.server.listen()

    def connect(self, port):
        parts = split.cut(model(), 3)[:1]
        if self.mode == "u-shaped":
            parts += [None, nn.BatchNorm1d(CLASSES)]
        self.trainer = Trainer(port, parts, **MODES[self.mode])
        self.trainer.client.connect()

    def step(self, number):
        delta = self.mode == "delta"
        self.trainer.step(number, ids=[(5 * number + sample) % 64 for sample in range(16)] if delta else None)

    def state(self):
        """All that a step changes, on both sides."""
        client, memories = self.trainer.client, [self.trainer.client._activations.memory]
        memories += [slot.activations.memory for slot in self.server._slots.values()]
        memories = [memory.state_dict() for memory in memories if memory]
        halves = everything(self.server.tail), client.state_dict(), self.trainer.optimizer.state_dict()
        return copy.deepcopy([*halves, *(memories or [None, None])])

    def steps(self):
        return self.trainer.client.step, self.server._slots["client"].step

    def asked(self):
        """How often the server began a step."""
        return self.traps["model"].calls

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.trainer.link.close()
        self.server.stop()


class TestAStep:
    """Both halves end where training without any error ends, to the bit."""

    @pytest.mark.parametrize(("mode", "place"), PLACES)
    def test_that_fails_is_taken_by_neither(self, mode, place, caplog):
        with Training(mode) as training:
            training.connect(training.port)
            for number in range(6):
                training.step(number)
            expected = training.state()
        with Training(mode) as training:
            training.connect(training.port)
            for number in range(6):
                for error in ERRORS:
                    before, asked = training.state(), training.asked()
                    with told(type(error).__name__), training.traps[place].set(error):
                        training.step(number)
                    assert same(before, training.state()) and training.steps() == (number, number)
                    assert training.asked() == asked + 1, "it is asked once"
                training.step(number)
            assert same(expected, training.state())
        logged = [record for record in caplog.records if record.exc_info]
        assert len(logged) == 6 * len(ERRORS) and all(record.levelno == logging.ERROR for record in logged)

    @pytest.mark.parametrize("mode", MODES)
    def test_errors_and_cuts_at_random_moments_change_nothing(self, mode):
        rng, steps = random.Random(mode), 12
        with Training(mode) as training:
            training.connect(training.port)
            for number in range(steps):
                training.step(number)
            expected = training.state()
        for _ in range(trials(2, 60)):
            with Training(mode) as training, Proxy(training.port) as proxy:
                training.connect(proxy.port)
                while training.trainer.client.step < steps:
                    if rng.random() < 0.3:
                        proxy.cut_after = proxy.carried + rng.randrange(1, 9000)
                    place = rng.choice([place for place in training.traps if (mode, place) in PLACES])
                    if rng.random() < 0.5:
                        with pytest.raises(ServerError), training.traps[place].set(rng.choice(ERRORS)):
                            training.step(training.trainer.client.step)
                    else:
                        training.step(training.trainer.client.step)
                    if rng.random() < 0.3 and mode != "u-shaped":
                        training.trainer.client.evaluate(*batch(rng.randrange(99)))
                proxy.cut_after = None
                assert same(expected, training.state()) and training.steps() == (steps, steps)

    def test_a_last_batch_of_one_is_batchnorms_error(self):
        head, tail = nn.Linear(INPUTS, WIDTH), nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES))
        with serving(tail) as (server, port):
            trainer = Trainer(port, [head])
            trainer.step(0)
            before = everything(server.tail)
            with told("FORWARD at step 1: ValueError: Expected more than 1 value per channel"):
                trainer.step(1, size=1)
            assert same(before, everything(server.tail))
            trainer.step(1)
            assert trainer.client.step == 2

    @pytest.mark.parametrize(
        ("loss", "words"),
        [
            (lambda outputs, labels: outputs.sum(1), r"loss: got shape \(16,\), expected one number"),
            (lambda outputs, labels: 1.0, "loss: got float"),
            (lambda outputs, labels: outputs.sum() * float("nan"), "the loss is nan"),
        ],
    )
    def test_a_loss_that_is_none_is_named(self, loss, words):
        with serving(loss=loss) as (server, port):
            before = everything(server.tail)
            with told(words, RefusedError):
                Trainer(port).step(0)
            assert same(before, everything(server.tail))

    def test_in_evaluation_is_told_too(self):
        tail = Fragile()
        with serving(tail) as (server, port):
            trainer = Trainer(port)
            trainer.step(0)
            tail.evaluating.error = RuntimeError("no")
            with told("EVALUATE at step 1: RuntimeError: no"):
                trainer.client.evaluate(*batch(1))
            tail.evaluating.error = None
            trainer.client.evaluate(*batch(1))
            trainer.step(1)

    def test_at_an_epochs_end_leaves_the_schedule(self):
        on_epoch = Trap()
        scheduler = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # noqa: E731
        with serving(on_epoch=on_epoch, scheduler=scheduler) as (server, port):
            trainer = Trainer(port)
            trainer.step(0)
            for error in (RuntimeError("no"), None):
                on_epoch.error = error
                with told("CONTROL at step 1: RuntimeError: no") if error else contextlib.nullcontext():
                    trainer.client.end_epoch()
            assert server.tail.optimizer.param_groups[0]["lr"] == 0.025

    def test_at_the_end_is_told_too(self, monkeypatch):
        with serving() as (server, port):
            trainer = Trainer(port)
            trainer.step(0)
            monkeypatch.setattr(server._finished, "set", Trap(), raising=True)
            server._finished.set.error = RuntimeError("no")
            with told("RuntimeError: no"):
                trainer.client.finish()


class TestCheckpoints:
    def start(self, folder, port):
        trainer = Trainer(port)
        trainer.client.keep(folder / "client", optimizer=trainer.optimizer)
        trainer.client.connect()
        return trainer

    @pytest.mark.parametrize("how", ["gone", "no folder", "read-only", "full"])
    def test_a_save_that_fails_is_told_and_training_goes_on(self, tmp_path, monkeypatch, how):
        with serving(checkpoints=tmp_path / "server") as (server, port):
            trainer = self.start(tmp_path, port)
            trainer.step(0)
            folder = tmp_path / "server"
            with monkeypatch.context() as patch:
                if how in ("gone", "no folder"):
                    folder.rename(tmp_path / "elsewhere")
                    (folder.touch if how == "no folder" else lambda: None)()
                else:  # for root no folder is read-only
                    code = {"read-only": errno.EROFS, "full": errno.ENOSPC}[how]
                    trap = Trap()
                    trap.error = OSError(code, how)
                    patch.setattr(server._checkpoints, "save", trap)
                with told("CONTROL at step 1: (FileNotFound|NotADirectory|OS)Error"):
                    trainer.client.save()
            if how in ("gone", "no folder"):
                folder.unlink(missing_ok=True)
                (tmp_path / "elsewhere").rename(folder)
            trainer.step(1)
            trainer.client.save()
            assert len(list(tmp_path.glob("*/*/step-000000002.pt"))) == 2

    def test_a_folder_that_cannot_be_read_is_told_at_the_handshake(self, tmp_path, monkeypatch):
        with serving(checkpoints=tmp_path / "server") as (server, port):
            trap = Trap()
            trap.error = PermissionError("no")
            monkeypatch.setattr(server._checkpoints, "steps", trap)
            with told("HELLO at step 0: PermissionError: no"):
                self.start(tmp_path, port)

    def test_of_another_model_they_are_named(self, tmp_path):
        with serving(checkpoints=tmp_path / "server") as (_, port):
            self.start(tmp_path, port)
        tail = nn.Sequential(nn.Linear(WIDTH, 7), nn.Linear(7, 5))
        with serving(tail, checkpoints=tmp_path / "server") as (_, port):
            with told("checkpoint of step 0: it does not fit this model or optimizer", RefusedError):
                self.start(tmp_path, port)
        shutil.rmtree(tmp_path / "server")
        with serving(checkpoints=tmp_path / "server") as (_, port):
            client = split.SplitClient(nn.Linear(INPUTS, WIDTH), split.Link(f"127.0.0.1:{port}"), shape=(WIDTH,))
            client.keep(tmp_path / "client")
            with pytest.raises(ConfigError, match="checkpoint of step 0: it does not fit"):
                client.connect()


class TestPatience:
    def test_counts_over_connections_that_come_back_and_break_again(self):
        with serving() as (server, port), Proxy(port) as proxy:
            trainer = Trainer(proxy.port, patience=1.0)
            trainer.step(0)
            over = threading.Event()

            def cut_every_request():
                while not over.is_set():
                    if proxy.cut_after is None:
                        proxy.cut_after = proxy.carried + 6000  # a handshake passes, this batch does not
                    over.wait(0.001)

            thread = threading.Thread(target=cut_every_request, daemon=True)
            thread.start()
            started = time.monotonic()
            try:
                with pytest.raises(LinkError, match="given up after 1 s"):
                    trainer.step(1, size=400)
                assert time.monotonic() - started < 6
                assert server.frames.bytes[Kind.HELLO] < 40 * 600, "with pauses"
            finally:
                over.set()
                thread.join()
            proxy.cut_after = None
            trainer.step(1, size=400)
            assert trainer.client.step == server._slots["client"].step == 2

    @pytest.mark.parametrize("options", [{}, DELTA], ids=["labels", "delta"])
    def test_a_step_that_was_given_up_and_taken_may_be_asked_again(self, options):
        """The answer is swallowed until the client gives up; another batch is then refused."""
        ids = list(range(16)) if options else None
        on_step = Trap()
        with serving(on_step=on_step, **options) as (server, port), Proxy(port) as proxy:
            trainer = Trainer(proxy.port, deadline=0.3, patience=0.3, **options)
            trainer.step(0, ids=ids)
            before = trainer.client.state_dict()
            on_step.inner = lambda *arguments: proxy.stalled.set()
            with pytest.raises(LinkError, match="given up after 0.3 s"):
                trainer.step(1, ids=ids)
            assert same(before, trainer.client.state_dict()) and trainer.client.step == 1
            proxy.stalled.clear()
            trainer.link.patience, trainer.link.deadline = 20, 20
            with pytest.raises(RefusedError, match="got request 2 of step 1, expected request 3 of step 2"):
                trainer.step(2, ids=ids)
            on_step.inner = lambda *arguments: None
            trainer.step(1, ids=ids)
            trainer.step(2, ids=ids)
            assert trainer.client.step == server._slots["client"].step == on_step.calls == 3

    def test_a_frame_that_trickles_meets_the_servers_deadline(self):
        with serving(deadline=0.5) as (server, port), Rogue(port, server.agreement) as client:
            client.hello()
            frame = wire.encode(Frame(Kind.FORWARD, client.session, 0, 1, 16, good_body(server.agreement)))
            answer = concurrent.futures.ThreadPoolExecutor(1).submit(client.receive)
            started = time.monotonic()
            for position in range(len(frame)):
                client.send(frame[position : position + 1])
                if concurrent.futures.wait([answer], 0.02).done:
                    break
            assert answer.result()[0] == grpc.StatusCode.CANCELLED
            assert time.monotonic() - started < 6

    def test_an_answer_that_trickles_meets_the_clients_deadline(self):
        over = threading.Event()

        def trickle(requests, context):
            next(iter(requests))
            for byte in wire.encode(Frame(Kind.WELCOME, body=bytes(4000))):
                yield bytes([byte])
                over.wait(0.02)

        handler = grpc.stream_stream_rpc_method_handler(trickle)
        _, service, method = METHOD.split("/")
        handlers = [grpc.method_handlers_generic_handler(service, {method: handler})]
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), handlers=handlers)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            started = time.monotonic()
            with pytest.raises(LinkError, match=r"no word from .* for 0.5 s"):
                Trainer(port, deadline=0.5, patience=0.5).client.connect()
            assert time.monotonic() - started < 5
        finally:
            over.set()
            server.stop(0).wait()

    def test_a_large_frame_over_a_slow_link_does_not(self):
        """Each MiB has the deadline to itself."""
        with serving(shape=(1 << 20,), deadline=0.6) as (server, port), Rogue(port, server.agreement) as client:
            client.hello()
            frame = wire.encode(Frame(Kind.FORWARD, client.session, 0, 1, 1, bytes((4 << 20) + 8)))
            for chunk in wire.chunks(frame):
                client.send(chunk)
                threading.Event().wait(0.3)
            assert client.receive()[0] == grpc.StatusCode.INTERNAL, "the model's shapes do not fit: it was read"


class TestTokens:
    @pytest.mark.parametrize(
        ("tokens", "words"),
        [
            ({"anna": ""}, "tokens: of anna: got an empty one"),
            ({"anna": "  "}, "tokens: of anna: got an empty one"),
            ({"anna": None}, "tokens: of anna: got another"),
            ({"anna": "gehäuse"}, "tokens: of anna: got another"),
            ({"anna": "a\n"}, "tokens: of anna: got another"),
            ({"../etc": "secret"}, "name: got"),
            ({"anna": "secret", "berta": "secret"}, "expected a different one for each client"),
            ({}, "expected a different one for each client"),
        ],
    )
    def test_that_let_anyone_in_are_refused(self, tokens, words):
        server = split.SplitServer(split.cut(model(), 3)[1], shape=(WIDTH,))
        with pytest.raises(ConfigError, match=words):
            server.listen(tokens=tokens)

    @pytest.mark.parametrize("token", ["", " ", "a\n", "ä", 3])
    def test_that_cannot_be_sent_are_refused(self, token):
        with pytest.raises(ConfigError, match="token: got"):
            split.Link("127.0.0.1:1", token=token)
