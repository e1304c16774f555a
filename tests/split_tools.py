"""For the tests of split learning: a small model, a connection that can be cut, a client that breaks rules."""

import contextlib
import queue
import selectors
import socket
import threading
import time

import grpc
import pytest
import torch
from torch import nn

from gcompress import ServerError, split
from gcompress.split import wire
from gcompress.split.codec import ActivationCodec
from gcompress.split.link import METHOD, channel_options
from gcompress.split.wire import Frame, Kind

INPUTS, WIDTH, CLASSES = 12, 24, 5
TOLD_SECONDS = 5.0


def model(seed=3):
    torch.manual_seed(seed)
    half = [nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    return nn.Sequential(*half, nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


def batch(number, size=16):
    """Inputs and labels of a step, the same whenever it is taken."""
    inputs = torch.randn(size, INPUTS, generator=torch.Generator().manual_seed(number))
    return inputs, inputs[:, :CLASSES].argmax(1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def good_body(agreement, number=0):
    """A body of FORWARD that the server takes."""
    activation = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(number))
    return ActivationCodec(agreement).encode(activation, batch(number)[1], None, 0, training=True)[0]


class Trainer:
    """A client with its optimizer, and the loop of a user."""

    def __init__(self, port, parts=None, **options):
        head, *rest = parts or split.cut(model(), 3)
        link = {name: options.pop(name) for name in list(options) if name in LINK_OPTIONS}
        link = {"deadline": 20, "patience": 20, **link}
        end = rest[1] if len(rest) > 1 else None
        self.link = split.Link(f"127.0.0.1:{port}", **link)
        options.setdefault("shape", (WIDTH,))
        self.client = split.SplitClient(head, self.link, end=end, **options)
        self.optimizer = sgd(self.client.parameters())

    def step(self, number, size=16, ids=None):
        inputs, labels = batch(number, size)
        self.optimizer.zero_grad()
        if self.client.end is not None:
            loss = nn.functional.cross_entropy(self.client(inputs, ids=ids), labels)
        else:
            loss = self.client(inputs, labels, ids=ids)
        loss.backward()
        self.optimizer.step()
        return loss.item()


LINK_OPTIONS = ("ca", "certificate", "key", "token", "name", "deadline", "patience", "server_name")


@contextlib.contextmanager
def serving(tail=None, listen=None, **options):
    """A server in this process; yields (server, port)."""
    options.setdefault("shape", (WIDTH,))
    tail = split.cut(model(), 3)[1] if tail is None else tail
    with split.SplitServer(tail, optimizer=sgd, **options) as server:
        yield server, server.listen("127.0.0.1:0", **(listen or {}))


class Proxy:
    """A TCP connection's middle, which can be cut or stalled. A context manager; `port` is its own."""

    def __init__(self, target):
        self._target, self._pairs, self._lock = target, [], threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.carried = 0
        self.cut_after = None  # bytes until the connections are cut
        self.stalled = threading.Event()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while not self._closed:
            try:
                ours, _ = self._listener.accept()
                theirs = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                continue
            with self._lock:
                self._pairs.append((ours, theirs))
            threading.Thread(target=self._carry, args=(ours, theirs), daemon=True).start()

    def _carry(self, ours, theirs):
        with contextlib.suppress(OSError, ValueError), selectors.DefaultSelector() as selector:
            selector.register(ours, selectors.EVENT_READ, theirs)
            selector.register(theirs, selectors.EVENT_READ, ours)
            while True:
                for key, _ in selector.select():
                    data = key.fileobj.recv(4096)
                    if not data:
                        return self._end(ours, theirs)
                    if self.stalled.is_set():
                        continue  # swallowed
                    self.carried += len(data)
                    if self.cut_after is not None and self.carried > self.cut_after:
                        self.cut_after = None
                        return self.cut()
                    key.data.sendall(data)

    @staticmethod
    def _end(*ends):
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self):
        """End all connections now; new ones are let through."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            self._end(*pair)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._closed = True
        self._listener.close()
        self.cut()


class Rogue:
    """A client that sends what it likes, in frames or not."""

    def __init__(self, port, agreement=None):
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", channel_options())
        self._sent = queue.Queue()
        self._call = self.channel.stream_stream(METHOD)(iter(self._sent.get, None), timeout=20)
        self._reader = wire.FrameReader(dict.fromkeys(Kind, 1 << 30))
        self.agreement = agreement
        self.session = wire.NO_SESSION

    def send(self, data):
        for chunk in wire.chunks(data):
            self._sent.put(chunk)

    def receive(self):
        """The next frame; (status, details) if the server ended the stream."""
        try:
            for chunk in self._call:
                for frame in self._reader.feed(chunk):
                    return frame
        except grpc.RpcError as error:
            return error.code(), error.details()
        return None, "ended"

    def ask(self, kind, step, sequence, samples=0, body=b"", session=None):
        self.send(wire.encode(Frame(kind, session or self.session, step, sequence, samples, body)))
        return self.receive()

    def hello(self, **changes):
        fields = {"agreement": self.agreement.to_dict(), "client": "client", "instance": "0" * 32, "session": None}
        fields |= {"sequence": 0, "run": "0" * 32, "steps": [0], **changes}
        answer = self.ask(Kind.HELLO, 0, 0, body=wire.write_message(fields))
        if isinstance(answer, Frame):
            self.session = answer.session
        return answer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._call.cancel()
        self._sent.put(None)
        self.channel.close()


@contextlib.contextmanager
def told(words, kind=ServerError):
    """The client gets the server's error, at once."""
    started = time.monotonic()
    with pytest.raises(kind, match=words):
        yield
    assert time.monotonic() - started < TOLD_SECONDS


class Trap:
    """Raises an error where it is called, if it is set; what is there otherwise is `inner`."""

    def __init__(self, inner=lambda *arguments: None):
        self.inner, self.error, self.calls = inner, None, 0

    def __call__(self, *arguments):
        result = self.inner(*arguments)
        self.calls += 1
        if self.error:
            raise self.error
        return result

    @contextlib.contextmanager
    def set(self, error):
        self.error = error
        try:
            yield
        finally:
            self.error = None
