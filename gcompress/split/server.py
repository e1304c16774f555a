"""The server has the model's later layers. It serves one client, or several in rounds."""

from __future__ import annotations

import copy
import logging
import os
import secrets
import threading
import time

import torch

from ..errors import ConfigError, PayloadError, RefusedError
from . import security, wire
from .agreement import Agreement
from .checkpoint import RUN_NAME, Checkpoints, fitting
from .codec import ActivationCodec, Codec, seed_of
from .service import Retry, Service
from .tail import Tail, checked_outputs
from .traffic import FrameCounter
from .undo import Undo
from .wire import Frame, Kind

_log = logging.getLogger(__name__)


class Slot:
    """What the server knows of one client.

    session: None until the first handshake. sequence: number of the last request that was carried
    out. The server keeps that request's checksum and its answer: if the request comes again, it
    gets the same answer and is not carried out again.
    """

    def __init__(self, name, tail, agreement):
        self.name, self.tail = name, tail
        self.activations = ActivationCodec(agreement)
        self.session = self.connection = self.instance = None
        self.step, self.sequence, self.request, self.answer = 0, 0, None, None
        self.asked = None  # (sequence, when it first came) of the last request to join

    def begin_session(self, step):
        self.session, self.step = secrets.token_bytes(16), step
        self.sequence, self.request, self.answer, self.asked = 0, None, None, None


class SplitServer:
    """Runs the later layers of a model for clients that have the first layers and the data.

    Args:
        model_tail: the part that `cut` returned after the client's.
        shape: of one sample's activation; see `activation_shape`.
        up, down: specs of the compressors for activations and for their gradients; "none" sends float32.
        optimizer, scheduler, loss, seed: see `gcompress.split.tail.Tail`.
        checkpoints: a folder for this half's checkpoints, if clients save; or None.
        rounds: `Sequential(…)` or `SplitFed(…)` for several clients; None for one.
        on_step: function of (client's name, step, Stats or None), called after every step. If it
            raises an error, the step is undone, as after any error in a step.
        on_epoch: function of (client's name, step), called when the client ends an epoch.
        deadline, idle, handshake_deadline: see `gcompress.split.service.Service`.
        labels, label_shape, max_batch, delta_samples, delta_first: see `Agreement`; the same at the client.
    """

    def __init__(
        self, model_tail, *, shape, up="none", down="none", optimizer=None, scheduler=None, loss=None, seed=0,
        checkpoints=None, rounds=None, on_step=None, on_epoch=None,
        deadline=60.0, idle=600.0, handshake_deadline=5.0, **agreement,
    ):  # fmt: skip
        self.agreement = Agreement(up=up, down=down, shape=shape, **agreement)
        arguments = {"loss": loss} if loss else {}
        self.tail = Tail(model_tail, optimizer, scheduler, seed=seed, **arguments)
        self._initial = copy.deepcopy(self.tail.state_dict())
        self.rounds = rounds
        self._checkpoints = Checkpoints(checkpoints) if checkpoints else None
        self._on_step = on_step or (lambda name, step, stats: None)
        self._on_epoch = on_epoch or (lambda name, step: None)
        self._gradients = Codec(self.agreement.down, self.agreement.shape, self.agreement.max_batch)
        self._outputs = self._output_codecs() if self.agreement.u_shaped else None
        self._slots, self._run, self._undo = {}, None, Undo()
        self._lock = threading.RLock()  # one request at a time changes anything
        self._finished = threading.Event()
        waits = {"deadline": deadline, "idle": idle, "handshake_deadline": handshake_deadline}
        self._service = Service(self._answer, self._limits, self._gone, **waits)
        if rounds:
            rounds.begin(self.tail, self._checkpoints)

    def _output_codecs(self):
        """The codecs of a U-shaped model's outputs, which go down, and of their gradients, which come up."""
        with torch.no_grad():
            self.tail.model.eval()
            output = checked_outputs(self.tail.model(torch.zeros(2, *self.agreement.shape, device=self.tail.device)))
        shape, most = tuple(output.shape[1:]), self.agreement.max_batch
        return Codec(self.agreement.down, shape, most), Codec(self.agreement.up, shape, most)

    @property
    def frames(self) -> FrameCounter:
        """The sizes of all frames so far."""
        return self._service.frames

    def socket_bytes(self) -> tuple[int, int] | None:
        """(sent, received) by TCP so far, or None; see `SocketCounter`."""
        return self._service.sockets.read()

    def listen(
        self,
        address: str = "127.0.0.1:0",
        *,
        ca: str | os.PathLike | None = None,
        certificate: str | os.PathLike | None = None,
        key: str | os.PathLike | None = None,
        tokens: dict[str, str] | None = None,
        insecure: bool = False,
        clients: int = 64,
    ) -> int:
        """Begin to serve in the background.

        Args:
            address: "host:port"; port 0 takes a free one.
            certificate, key: files with this server's certificate and its key; they turn on TLS.
            ca: file with the certificate of the authority that signed the clients' certificates, for
                mutual TLS. A client's name is then its certificate's common name.
            tokens: {client's name: token}, in place of `ca` or with it.
            insecure: let other machines connect in plaintext, or without a certificate or token.
            clients: how many may be connected at once.

        Returns:
            The port.
        """
        return self._service.listen(
            address, ca=ca, certificate=certificate, key=key, tokens=tokens, insecure=insecure, clients=clients
        )

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the client, or the last round, has finished. Returns False if `timeout` seconds pass first."""
        return self._finished.wait(timeout)

    def stop(self, grace: float = 1.0) -> None:
        """End all connections."""
        self._service.stop(grace)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    # What a client may send, and what is done with it; called from the service's threads.

    def _limits(self, connection):
        if connection.session is None:
            return {Kind.HELLO: wire.MESSAGE_LIMIT}
        largest = self._slots[connection.name].activations.largest()
        limits = {Kind.FORWARD: largest, Kind.EVALUATE: largest, Kind.CONTROL: wire.MESSAGE_LIMIT}
        if self._outputs:
            limits[Kind.BACKWARD] = self._outputs[1].nbytes(self.agreement.max_batch)
        if self.rounds:
            limits[Kind.HAND_IN] = self.rounds.largest_head()
        return limits

    def _gone(self, connection):
        with self._lock:
            slot = self._slots.get(connection.name)
            if slot and slot.connection is connection:
                slot.connection = None

    def _answer(self, connection, frame):
        if frame.kind == Kind.HELLO:
            return self._hello(connection, frame)
        if self.rounds and frame.kind == Kind.CONTROL:
            self._wait_turn(connection, frame)
        with self._lock:
            slot = self._slots[connection.name]
            if slot.session != connection.session or slot.connection is not connection:
                raise Retry("another connection of this client has taken over")
            if frame.session != slot.session:
                raise PayloadError("frame: it is of another session")
            request = (frame.kind, frame.step, frame.samples, wire.checksum(frame.body))
            if frame.sequence == slot.sequence and request == slot.request:
                return slot.answer  # asked again because our answer was lost on the way
            if frame.sequence != slot.sequence + 1 or frame.step != slot.step:
                raise PayloadError(
                    f"frame: got request {frame.sequence} of step {frame.step}, expected request {slot.sequence + 1} "
                    f"of step {slot.step}"
                )
            kind, step, samples, body = self._carry_out(slot, frame)
            slot.sequence, slot.request = frame.sequence, request
            slot.answer = Frame(kind, slot.session, step, frame.sequence, samples, body)
            return slot.answer

    def _carry_out(self, slot, frame):
        if frame.kind == Kind.CONTROL:
            return self._control(slot, frame)
        if frame.kind == Kind.HAND_IN:
            self.rounds.hand_in(slot, frame)
            return Kind.ANSWER, frame.step, 0, wire.write_message({})
        if self.rounds:
            self.rounds.check_turn(slot, training=frame.kind != Kind.EVALUATE)
        if frame.kind == Kind.EVALUATE:
            return self._evaluate(slot, frame)
        with self._undo.on_error(slot):
            return (self._forward if frame.kind == Kind.FORWARD else self._backward)(slot, frame)

    # The handshake.

    def _hello(self, connection, frame):
        """Parse the handshake before taking the lock, so that what a stranger sends delays nobody."""
        message = wire.read_message(frame.body)
        theirs = Agreement.from_message(wire.take(message, "agreement", dict))
        with self._lock:
            name = self._checked_name(connection, message)
            self.agreement.compare(theirs, "server", "client")
            return self._welcome(connection, frame, message, name)

    def _welcome(self, connection, frame, message, name):
        instance = wire.take(message, "instance", str)
        slot = self._slots.get(name)
        if slot is None:
            slot = Slot(name, self.rounds.tail_for(name) if self.rounds else self.tail, self.agreement)
        if slot.connection and slot.connection.alive and slot.instance != instance:
            raise Retry(f"a client named {name} is still connected")
        live = self._same_session(slot, message)
        if not live:
            slot.begin_session(0 if self.rounds else self._settle(slot, message))
            if self.rounds:
                self.rounds.restarted(slot)
        self._slots[name] = slot
        old, slot.connection, slot.instance = slot.connection, connection, instance
        connection.name, connection.session = name, slot.session
        if old:
            old.end()
        _log.info("client %s at step %d, %s", name, slot.step, "as before" if live else "new session")
        output = list(self._outputs[0].shape) if self._outputs else None
        fields = {"session": slot.session.hex(), "step": slot.step, "live": live, "output": output}
        welcome = {**fields, "rounds": bool(self.rounds), "agreement": self.agreement.to_dict()}
        return Frame(Kind.WELCOME, slot.session, slot.step, frame.sequence, 0, wire.write_message(welcome))

    def _checked_name(self, connection, message):
        claimed = wire.take(message, "client", str)
        try:
            name = security.check_name(connection.name or claimed)
        except ConfigError as error:
            raise RefusedError(str(error)) from None
        if self.rounds:
            self.rounds.check_member(name)
        elif self._slots and name not in self._slots:
            raise RefusedError(f"this server serves one client, {next(iter(self._slots))}; {name} needs another server")
        return name

    def _same_session(self, slot, message):
        """Whether the client can go on where the connection broke: at most the last answer may be missing."""
        session = wire.take(message, "session", str, default=None)
        if slot.session is None or session != slot.session.hex():
            return False
        return wire.take(message, "sequence", int) in (slot.sequence, slot.sequence - 1)

    def _settle(self, slot, message):
        """Bring the tail to the last step that both halves have saved. Returns that step."""
        run = wire.take(message, "run", str)
        if not RUN_NAME.fullmatch(run):
            raise PayloadError("message: run is not 32 hexadecimal digits")
        theirs = set(wire.take(message, "steps", [int]))
        saved = self._checkpoints.steps(run) if self._checkpoints else []
        common = theirs & {0, *saved}
        if not common:
            raise RefusedError(
                f"no common step to go on from: the client has saved {sorted(theirs)} of this run, the server {saved}; "
                "both halves need a checkpoint folder to go on after one was lost"
            )
        step = max(common)
        state = self._checkpoints.load(run, step) if step in saved else {"tail": self._initial}
        slot.session = None  # if loading fails, the old session is over
        with fitting(f"step {step}"):
            self.tail.load_state_dict(copy.deepcopy(state["tail"]))
            slot.activations.reset()
            if "memory" in state:
                slot.activations.memory.load_state_dict(state["memory"])
        if self._checkpoints:
            self._checkpoints.discard_after(run, step)
        self._run = run
        self._finished.clear()
        return step

    # The requests.

    def _forward(self, slot, frame):
        activation, labels = slot.activations.decode(frame.body, frame.samples, training=True)
        if self._outputs:
            outputs = slot.tail.forward(activation, slot.step)
            body = self._outputs[0].encode(outputs, seed_of("output", slot.step))
            return Kind.OUTPUT, slot.step, frame.samples, body
        seed = seed_of("down", slot.step)
        stats, body = slot.tail.train_step(activation, labels, slot.step, lambda g: self._gradients.encode(g, seed))
        self._count_step(slot, frame.samples, stats)
        return Kind.GRADIENT, slot.step, frame.samples, stats.to_bytes() + body

    def _backward(self, slot, frame):
        if self._outputs is None:
            raise PayloadError("frame: BACKWARD without a U-shaped model")
        seed = seed_of("down", slot.step)
        gradient = self._outputs[1].decode(frame.body, frame.samples, slot.tail.device)
        body = slot.tail.backward(gradient, lambda g: self._gradients.encode(g, seed))
        self._count_step(slot, frame.samples, None)
        slot.tail.drop_forward()
        return Kind.GRADIENT, slot.step, frame.samples, body

    def _count_step(self, slot, samples, stats):
        self._on_step(slot.name, slot.step + 1, stats)  # first: if it raises an error, the step is undone
        slot.step += 1
        if self.rounds:
            self.rounds.count(slot, samples)

    def _evaluate(self, slot, frame):
        activation, labels = slot.activations.decode(frame.body, frame.samples, training=False)
        result = slot.tail.evaluate(activation, labels)
        if self._outputs:
            body = self._outputs[0].encode(result, seed_of("output", slot.step))
            return Kind.OUTPUT, slot.step, frame.samples, body
        return Kind.STATISTICS, slot.step, frame.samples, result.to_bytes()

    def _control(self, slot, frame):
        message = wire.read_message(frame.body)
        what = wire.take(message, "do", str)
        if what == "join" and self.rounds:
            return self._join(slot)
        answers = {"save": self._save, "end_epoch": self._end_epoch, "finish": self._finish}
        if what not in answers or (self.rounds and what == "save"):
            raise PayloadError(f"message: got the request {what[:40]!r}, which this server does not know")
        answers[what](slot)
        return Kind.ANSWER, slot.step, 0, wire.write_message({})

    def _save(self, slot):
        if self._checkpoints is None:
            raise RefusedError("the client saves checkpoints, the server has no folder for its half")
        state = {"tail": slot.tail.state_dict()}
        if slot.activations.memory:
            state["memory"] = slot.activations.memory.state_dict()
        self._checkpoints.save(self._run, slot.step, state)
        self._checkpoints.prune(self._run)

    def _end_epoch(self, slot):
        with self._undo.on_error(slot):
            slot.tail.end_epoch()
            self._on_epoch(slot.name, slot.step)

    def _finish(self, slot):
        if self.rounds is None or self.rounds.leave(slot):
            self._finished.set()

    def _join(self, slot):
        """Answer with the head for the client's next round, or tell the client to ask again."""
        outcome = self.rounds.join(slot)
        if outcome is None:
            return Kind.ANSWER, slot.step, 0, wire.write_message({"wait": True})
        slot.activations.reset()  # the client does the same: its last request may be lost
        finished, head = outcome
        slot.step = 0
        return Kind.WEIGHTS, self.rounds.number, int(finished), head

    def _wait_turn(self, connection, frame):
        """If a client asks to join, wait for its turn, before the lock is taken.

        Meanwhile it may ask again over another connection. Then one of the two requests is carried out.
        """
        if wire.read_message(frame.body).get("do") == "join":
            slot = self._slots[connection.name]
            if slot.asked is None or slot.asked[0] != frame.sequence:
                slot.asked = frame.sequence, time.monotonic()
            self.rounds.wait_turn(slot.name, since=slot.asked[1])
