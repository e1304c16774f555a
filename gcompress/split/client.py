"""The client has the data and the model's first layers. Its training loop stays as it is."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import sys
import time
import weakref
from collections.abc import Callable

import torch
from torch import nn

from ..errors import ConfigError, LinkError, PayloadError, RefusedError, RolledBack
from . import wire
from .agreement import LARGEST_SAMPLE, Agreement
from .checkpoint import Checkpoints, fitting, new_run
from .codec import STATISTICS_BYTES, ActivationCodec, Codec, Stats, seed_of
from .cut import checked_activation, kept_modes
from .functions import Batch, CutLoss, CutOutputs
from .link import Broken, Patience, RoundLost
from .undo import buffers, restore_buffers
from .wire import Frame, Kind

FINISH_SECONDS = 20.0  # of patience in finish(): a server that was told so may stop before its answer arrives


class SplitClient(nn.Module):
    """The first layers of a model, as a module like any other. A server has the other layers.

        loss = client(images, labels)   # the server's part of the step is done here
        loss.backward()                 # the activation's gradient, from the server, goes on
        optimizer.step()

    U-shaped: with `end`, the model's last layers are here, too. Labels stay here, and the loss is the script's:

        loss = criterion(client(images), labels)
        loss.backward()                 # the server's part of the step is done here

    Args:
        model_head: the layers before the cut.
        link: the connection to the server.
        up, down: specs of the compressors for activations and for their gradients; "none" sends
            float32. The backward pass treats a compressor as the identity (straight-through).
        end: the layers after the server's, for a U-shaped model (nn.Identity() for none).
        shape: of one sample's activation. Without it, the first forward pass shows it.
        labels: type in which labels are sent, see `Agreement` (not with `end`).
        label_shape, max_batch, delta_samples, delta_first: see `Agreement`.

    Attributes:
        stats: `Stats` of the last batch, if the labels go to the server.
        step: how many training steps both halves have taken.
    """

    def __init__(self, model_head, link, up="none", down="none", *, end=None, shape=None, labels="int64", **agreement):
        super().__init__()
        self.head, self.end, self.link = model_head, end, link
        labels = None if end is not None else labels
        self._terms = {"up": up, "down": down, "labels": labels, **agreement}
        Agreement(shape=shape or (1,), **self._terms)  # refuse bad terms now
        self.agreement = None
        if shape is not None:
            self._agree(shape)
        self.stats, self.step = None, 0
        self._batches, self._forwarded = weakref.WeakSet(), None  # whose backward pass the server waits for
        self._instance = secrets.token_hex(16)
        self._session, self._sequence = wire.NO_SESSION, 0
        self._checkpoints, self._kept, self._run, self._untouched = None, {}, new_run(), True
        self.wait_seconds = 0.0

    def _agree(self, shape):
        self.agreement = Agreement(shape=tuple(shape), **self._terms)
        self._activations = ActivationCodec(self.agreement)
        self._gradients = Codec(self.agreement.down, self.agreement.shape, self.agreement.max_batch)
        self._outputs = None

    def keep(self, folder: str | os.PathLike, *, resume: bool = True, **objects: object) -> SplitClient:
        """Save this half's state in a folder, and go on from what is there. Call it before the first step.

        Args:
            folder: one for this half alone.
            resume: go on with the run that was saved last; False begins a new one.
            objects: what else belongs to the state: optimizer=…, scheduler=…, anything with
                `state_dict` and `load_state_dict`.
        """
        self._checkpoints, self._kept = Checkpoints(folder), objects
        run = self._checkpoints.latest_run() if resume else None
        if run:
            self._run, self._untouched = run, False
        return self

    def connect(self) -> int:
        """Connect, and bring both halves to the last step that both have saved. Returns that step.

        Without this call the first forward pass connects. After `keep`, call it before training:
        it loads what was saved. In a new run both halves save step 0.
        """
        if self.agreement is None:
            raise ConfigError("shape: got none, expected the activation's, so that connect() can come first")
        while not self.link.open:
            try:
                self._reach_server(Patience(self.link))
            except RolledBack:
                pass  # that is what was asked for
            if self._checkpoints and self._untouched and not self._in_rounds:
                self._untouched = False
                try:
                    self.save()
                except RolledBack:
                    continue
        return self.step

    def forward(
        self, inputs: torch.Tensor, labels: torch.Tensor | None = None, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The forward pass of a training step; in eval() mode or without gradients, an evaluation.

        In an evaluation the server's layers are in eval() mode, and nothing is trained. Under
        torch.utils.checkpoint with use_reentrant=False a batch is still one step.

        Args:
            inputs: a batch.
            labels: the batch's; None if the model is U-shaped.
            ids: an integer for each sample that names it, for delta mode.

        Returns:
            The mean loss that the server computed (`stats` has more). If U-shaped: the outputs.

        Raises:
            RolledBack: the server was lost and came back at an older step. Both halves have
                loaded that step, and the loop should go on from there.
            LinkError: the server could not be reached for longer than the link's patience.
            RefusedError: the server refuses this client.
            ServerError: the server's part of the step failed. Neither half has taken the step,
                and buffers are as before. The loop may try this batch again, or another one.
        """
        if not (self.training and torch.is_grad_enabled()):
            result = self._evaluate(self._run_head(inputs), labels)
            return self.end(result) if self.end is not None else torch.tensor(result.loss)
        before = buffers(*self._halves())
        activation = self._run_head(inputs)
        if not activation.requires_grad:  # a head without parameters: the server alone learns
            activation = activation.detach().requires_grad_()
        batch = self._batch_of(activation, labels, before)
        if self.end is not None:
            return self.end(CutOutputs.apply(activation, self, batch, ids))
        return CutLoss.apply(activation, self, batch, ids)

    def evaluate(self, inputs: torch.Tensor, labels: torch.Tensor | None) -> tuple:
        """`Stats` of a batch without training on it (labels at the server)."""
        with kept_modes(self):
            self.eval()
            with torch.no_grad():
                return self._evaluate(self._run_head(inputs), labels)

    def _run_head(self, inputs):
        if isinstance(inputs, torch.Tensor) and inputs.dim() and not len(inputs):
            raise ConfigError("inputs: got an empty batch, expected 1 sample or more")
        activation = checked_activation(self.head(inputs))
        if self.agreement is None:
            self._agree(activation.shape[1:])
        return activation

    def _halves(self):
        """The parts of the model that are here."""
        return [part for part in (self.head, self.end) if part is not None]

    def _batch_of(self, activation, labels, before):
        """A new `Batch`, or within a backward pass the one that the server was asked about already.

        Only gradient checkpointing runs a forward pass within a backward pass. It computes the
        head again, for its gradients, after the server has taken the step.
        """
        if torch._C._current_graph_task_id() == -1:
            batch = Batch(activation.detach(), labels, before)
            self._batches.add(batch)
            return batch
        for batch in self._batches:
            if batch.is_of(activation, labels):
                batch.repeated = True
                return batch
        raise ConfigError(
            "inputs: got, within a backward pass, a batch that no step was taken for: gradient checkpointing needs "
            "use_reentrant=False and a head that computes the same again"
        )

    def end_epoch(self) -> None:
        """Tell the server that an epoch has ended: it steps its scheduler."""
        self._control("end_epoch")

    def finish(self) -> None:
        """Tell the server that this client has finished, and disconnect."""
        patience, self.link.patience = self.link.patience, min(self.link.patience, FINISH_SECONDS)
        try:
            self._control("finish")
        except RefusedError:
            raise
        except LinkError:
            pass  # gone already: its answer was lost, or it has nothing more to do either
        finally:
            self.link.patience = patience
            self.link.close()

    def save(self) -> None:
        """Save both halves under the current step number. Call it after the optimizer's step."""
        if self._checkpoints is None:
            raise ConfigError("save: no folder was given, expected keep(folder) before")
        self._checkpoints.save(self._run, self.step, self._state())
        self._control("save")
        self._checkpoints.prune(self._run)

    def run_rounds(self, train: Callable[[int], object]) -> list:
        """Take part in all rounds of a server that has several clients.

        Args:
            train: function of the round's number that trains for one round. When it is called,
                the head has the round's weights. If a round goes on without this client, it is
                called again, for a later round or the same. Its errors are raised here.

        Returns:
            The numbers of the rounds that counted.
        """
        counted: list[int] = []
        while True:
            try:
                number, finished = self._join()
                if finished:
                    return counted
                train(number)
                self._hand_in(number)
                counted.append(number)
            except RolledBack:
                continue

    @property
    def traffic(self) -> dict:
        """Bytes of frames so far: "up" and "down" of training, "evaluation", "other". Resent frames count again."""
        frames = self.link.frames
        up, down = frames.total(Kind.FORWARD, Kind.BACKWARD), frames.total(Kind.GRADIENT)
        evaluation = frames.total(Kind.EVALUATE, Kind.STATISTICS)
        if self.end is not None:  # the same kind in training and evaluation
            down += frames.total(Kind.OUTPUT)
        return {
            "up": up,
            "down": down,
            "evaluation": evaluation,
            "other": sum(frames.bytes.values()) - up - down - evaluation,
        }

    @property
    def compression_seconds(self) -> float:
        """Time spent on encoding and decoding so far."""
        codecs = [self._activations, self._gradients, *(self._outputs or [])] if self.agreement else []
        return sum(codec.seconds for codec in codecs)

    @staticmethod
    def peak_memory() -> int:
        """The largest memory this process has held, in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak

    # Steps, called from the autograd functions of functions.py.

    def _train_step(self, batch, ids):
        activation = batch.activation
        with self._step_of(batch):
            body, samples = self._activations.encode(activation, batch.labels, ids, self.step, training=True)
            size = STATISTICS_BYTES + self._gradients.nbytes(samples)
            answer = self._request(Kind.FORWARD, samples, body, {Kind.GRADIENT: size})
            sections = wire.read_sections(answer.body, [STATISTICS_BYTES, size - STATISTICS_BYTES])
            self.stats = Stats.from_bytes(sections[0])
            batch.gradient = self._gradients.decode(sections[1], samples, activation.device)
            batch.result = torch.tensor(self.stats.loss, device=activation.device)
        self.step += 1

    def _forward_outputs(self, batch, ids):
        with self._step_of(batch):
            body, samples = self._activations.encode(batch.activation, None, ids, self.step, training=True)
            batch.result = self._ask_outputs(Kind.FORWARD, body, samples, batch.activation.device)
        self._forwarded = batch

    def _ask_outputs(self, kind, body, samples, device):
        if not self.link.open:
            self._reach_server(Patience(self.link))  # the handshake tells the outputs' shape
        codec = self._outputs[0]
        answer = self._request(kind, samples, body, {Kind.OUTPUT: codec.nbytes(samples)})
        return codec.decode(answer.body, samples, device)

    def _backward_outputs(self, batch, gradient):
        if self._forwarded is not batch:
            raise ConfigError("backward: got a batch that is not the last one, or was trained on, or lost its server")
        samples = len(gradient)
        with self._step_of(batch):
            body = self._outputs[1].encode(gradient, seed_of("back", self.step))
            answer = self._request(Kind.BACKWARD, samples, body, {Kind.GRADIENT: self._gradients.nbytes(samples)})
            result = self._gradients.decode(answer.body, samples, gradient.device)
        self._forwarded = None
        self.step += 1
        return result

    @contextlib.contextmanager
    def _step_of(self, batch):
        """A context for one step. If it fails, buffers and the memory of activations are put back, as at the server."""
        try:
            yield
        except RolledBack:
            self._activations.revert()
            raise
        except BaseException:
            self._activations.revert()
            restore_buffers(self._halves(), batch.before)
            raise
        self._activations.commit()

    def _evaluate(self, activation, labels):
        body, samples = self._activations.encode(activation, labels, None, self.step, training=False)
        if self.end is not None:
            return self._ask_outputs(Kind.EVALUATE, body, samples, activation.device)
        answer = self._request(Kind.EVALUATE, samples, body, {Kind.STATISTICS: STATISTICS_BYTES})
        self.stats = Stats.from_bytes(answer.body)
        return self.stats

    def _control(self, what):
        self._request(Kind.CONTROL, 0, wire.write_message({"do": what}), {Kind.ANSWER: wire.MESSAGE_LIMIT})

    def _join(self):
        limits = {Kind.ANSWER: wire.MESSAGE_LIMIT, Kind.WEIGHTS: wire.weights_limit(self.head.state_dict())}
        while True:
            answer = self._request(Kind.CONTROL, 0, wire.write_message({"do": "join"}), limits)
            if answer.kind == Kind.WEIGHTS:
                self.head.load_state_dict(wire.read_weights(answer.body, self.head.state_dict()))
                self._activations.reset()
                self.step = 0
                return answer.step, bool(answer.samples)

    def _hand_in(self, number):
        body = wire.write_weights(self.head.state_dict())
        self._request(Kind.HAND_IN, 0, body, {Kind.ANSWER: wire.MESSAGE_LIMIT})

    # The session: every request is answered once, whatever happens to the connection.

    def _request(self, kind, samples, body, limits):
        """Send a request until it is answered; the server carries it out once."""
        started, patience = time.perf_counter(), Patience(self.link)
        if not self.link.open:
            self._reach_server(patience)
        while True:
            # Built for each attempt: before the first answer, a new connection may give the session another name.
            frame = Frame(kind, self._session, self.step, self._sequence + 1, samples, body)
            try:
                answer = self.link.exchange(frame, limits)
                break
            except RoundLost:
                raise RolledBack(0) from None
            except Broken as error:
                patience.wait(error)
                self._reach_server(patience)
        if answer.session != self._session or answer.sequence != frame.sequence:
            self.link.close()
            raise PayloadError("frame: the answer is not to this request")
        self._sequence += 1
        self._untouched = False
        self.wait_seconds += time.perf_counter() - started
        return answer

    def _reach_server(self, patience):
        """Connect and shake hands, for as long as patience lasts; RolledBack if the session does not go on."""
        while True:
            try:
                self.link.connect()
                welcome = self._shake_hands()
                break
            except Broken as error:
                patience.wait(error)
        if not welcome:
            raise RolledBack(self.step)

    def _shake_hands(self):
        """True if this session goes on, or if it is the first one and nothing was trained yet."""
        first = self._session == wire.NO_SESSION
        hello = {
            "agreement": self.agreement.to_dict(),
            "fingerprint": self.agreement.fingerprint,
            "client": self.link.name,
            "instance": self._instance,
            "session": None if first else self._session.hex(),
            "sequence": self._sequence,
            "run": self._run,
            "steps": self._saved_steps(),
        }
        frame = Frame(Kind.HELLO, body=wire.write_message(hello))
        answer = self.link.exchange(frame, {Kind.WELCOME: wire.MESSAGE_LIMIT})
        message = wire.read_message(answer.body)
        Agreement.from_message(wire.take(message, "agreement", dict)).compare(self.agreement, "server", "client")
        self._set_output_shape(message)
        live, self._in_rounds = wire.take(message, "live", bool), wire.take(message, "rounds", bool)
        if live and not first and answer.session == self._session:
            return True
        self._session, self._sequence, self._forwarded = answer.session, 0, None
        if self._in_rounds:
            self.step = 0
            return first
        return self._go_back(wire.take(message, "step", int))

    def _set_output_shape(self, message):
        shape = wire.take(message, "output", [int], default=None)
        if self.end is None or self._outputs:
            return
        if shape is None or torch.Size(shape).numel() > LARGEST_SAMPLE:
            raise PayloadError(f"message: output has shape {shape}, expected that of the server's outputs")
        most = self.agreement.max_batch
        self._outputs = Codec(self.agreement.down, shape, most), Codec(self.agreement.up, shape, most)

    def _saved_steps(self):
        steps = self._checkpoints.steps(self._run) if self._checkpoints else []
        return [0] if self._untouched else steps

    def _go_back(self, step):
        """Load what was saved for a step. True if nothing was trained yet: then there is nothing to load."""
        if self._untouched and step == 0:
            return True
        if not self._checkpoints or step not in self._checkpoints.steps(self._run):
            raise PayloadError(f"message: the server goes on from step {step}, which this client did not offer")
        state = self._checkpoints.load(self._run, step)
        with fitting(f"step {step}"):
            self._load_state(state)
        self._checkpoints.discard_after(self._run, step)
        self.step = step
        return False

    def _state(self):
        state = {"head": self.head.state_dict(), "objects": {n: o.state_dict() for n, o in self._kept.items()}}
        if self.end is not None:
            state["end"] = self.end.state_dict()
        if self._activations.memory:
            state["memory"] = self._activations.memory.state_dict()
        return state

    def _load_state(self, state):
        self.head.load_state_dict(state["head"])
        if self.end is not None:
            self.end.load_state_dict(state["end"])
        self._activations.reset()
        if self._activations.memory:
            self._activations.memory.load_state_dict(state["memory"])
        for name, kept in self._kept.items():
            kept.load_state_dict(state["objects"][name])
