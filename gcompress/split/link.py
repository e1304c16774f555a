"""The client's end of the link: frames over one bidirectional gRPC stream."""

from __future__ import annotations

import contextlib
import queue
import threading
import time

import grpc

from ..errors import ConfigError, LinkError, RefusedError, ServerError
from . import security, wire
from .traffic import FrameCounter, SocketCounter
from .wire import Frame, Kind

METHOD = "/gcompress.Split/Stream"
FAILED = "gcompress-failed"  # in the metadata of a status that reports an error at the server
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 1.0  # seconds between attempts
QUEUED_CHUNKS = 8  # of at most a MiB each, that may wait for a slow peer in each direction
REFUSALS = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
}


def channel_options():
    """The options of both ends: small messages only, dead peers are noticed, each attempt to connect is a new one."""
    return [
        ("grpc.max_receive_message_length", wire.CHUNK_BYTES),
        ("grpc.max_send_message_length", wire.CHUNK_BYTES),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]


class Broken(Exception):
    """The stream broke; a new one may work."""


class Patience:
    """How long a request is repeated. The time counts from its first failure, even if something worked since.

    Args:
        link: its `patience` is the time in seconds.
    """

    def __init__(self, link):
        self._link, self._over, self._pause = link, None, FIRST_PAUSE

    def wait(self, why):
        """Pause before the next attempt, longer each time; raises the link's LinkError if the time is over."""
        now = time.monotonic()
        self._over = self._over or now + self._link.patience
        if now + self._pause > self._over:
            raise self._link.give_up(why) from None
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


class RoundLost(Exception):
    """The server's round goes on without this client."""


class Link:
    """A client's connection to a server.

    Args:
        address: "host:port".
        ca: file with the certificate of the authority that signed the server's; turns on TLS.
        certificate, key: files with this client's certificate and its key, for mutual TLS.
        token: this client's token, for a server that knows its clients by token.
        insecure: allow plaintext to another machine.
        name: of this client, if no certificate or token says it.
        server_name: the name in the server's certificate, if it is not the address's host.
        deadline: seconds until the server begins its answer, and for each MiB of it.
        patience: seconds for which a request is repeated after it lost the connection for the first time.
    """

    def __init__(
        self, address, *, ca=None, certificate=None, key=None, token=None, insecure=False, name="client",
        server_name=None, deadline=60.0, patience=120.0,
    ):  # fmt: skip
        self.address = address
        host, port = security.split_address(address)
        self.name = security.check_name(name)
        self.deadline, self.patience = deadline, patience
        for argument, value in (("deadline", deadline), ("patience", patience)):
            if not value > 0:
                raise ConfigError(f"{argument}: got {value}, expected seconds above 0")
        if token is not None:
            security.check_token(token)
        self._credentials = security.client_credentials(address, ca, certificate, key, insecure)
        self._files = {"ca": ca, "certificate": certificate, "key": key, "server_name": server_name}
        self._metadata = [("authorization", f"Bearer {token}")] if token is not None else []
        self._server_name = server_name
        self._channel = self._call = None
        self.frames, self.sockets = FrameCounter(), SocketCounter(port, server=False)

    @property
    def open(self) -> bool:
        return self._call is not None

    def connect(self) -> None:
        """Begin a new stream. Whether the server accepts it shows at the first exchange."""
        self.close()
        options = channel_options()
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self.address, options)
        else:
            if self._server_name:
                options.append(("grpc.ssl_target_name_override", self._server_name))
            self._channel = grpc.secure_channel(self.address, self._credentials, options)
        self._outgoing: queue.Queue = queue.Queue(QUEUED_CHUNKS)
        self._incoming: queue.Queue = queue.Queue(QUEUED_CHUNKS)
        outgoing = self._outgoing
        self._call = self._channel.stream_stream(METHOD)(iter(outgoing.get, None), metadata=self._metadata)
        self._reader = wire.FrameReader({})
        threading.Thread(target=_pump, args=(self._call, self._incoming), daemon=True).start()

    def exchange(self, frame: Frame, limits: dict[Kind, int]) -> Frame:
        """Send a request and wait for its answer.

        Args:
            frame: the request.
            limits: {Kind: largest body} of the answers that may come.

        Raises:
            Broken: the connection was lost, or the deadline passed.
            RefusedError: the server refuses, and would refuse again.
            ServerError: the server failed while it carried out the request.
            PayloadError: the answer is malformed.
        """
        self._reader.limits = limits
        self.frames.add(frame)
        try:
            for chunk in wire.chunks(wire.encode(frame)):
                self._outgoing.put(chunk, timeout=self.deadline)
            due, progress = time.monotonic() + self.deadline, self._reader.progress
            while True:
                received = self._incoming.get(timeout=max(0.0, due - time.monotonic()))
                if isinstance(received, Exception):
                    self._raise(received)
                for answer in self._reader.feed(received):
                    self.frames.add(answer)
                    return answer
                if self._reader.progress != progress:
                    due, progress = time.monotonic() + self.deadline, self._reader.progress
        except (queue.Empty, queue.Full):
            self.close()
            raise Broken(f"no word from {self.address} for {self.deadline:g} s") from None
        except BaseException:  # an interrupt, too: a late answer would be taken for that of the next request
            self.close()
            raise

    def _raise(self, error):
        self.close()
        if not isinstance(error, grpc.RpcError):
            raise Broken("the server ended the stream")
        code, details = error.code(), error.details() or ""
        if any(name == FAILED for name, _ in error.trailing_metadata() or ()):
            raise ServerError(f"{self.address} failed, neither half has carried it out, its log says where: {details}")
        if code == grpc.StatusCode.ABORTED:
            raise RoundLost(details)
        if code in REFUSALS:
            raise RefusedError(f"{self.address} refuses this client: {details}")
        if code == grpc.StatusCode.UNAVAILABLE and (reason := security.why_unreachable(self.address, **self._files)):
            raise RefusedError(f"{self.address}: {reason}")
        raise Broken(f"{code.name.lower()}: {details}")

    def close(self) -> None:
        """End the stream; safe at any time."""
        if self._call is None:
            return
        with contextlib.suppress(OSError):
            self.sockets.read()
        call, self._call = self._call, None
        call.cancel()
        _drain(self._outgoing)
        self._outgoing.put(None)  # ends gRPC's thread that waits for the next chunk
        _drain(self._incoming)
        self._channel.close()

    def give_up(self, why: str) -> LinkError:
        """The LinkError for a connection that did not come back in time."""
        return LinkError(f"{self.address}: given up after {self.patience:g} s: {why}")


def _pump(call, incoming):
    """Move chunks into a bounded queue. While it is full, gRPC does not read, and so the server cannot send."""
    try:
        for chunk in call:
            incoming.put(chunk)
        end = EOFError("end of stream")
    except Exception as error:
        end = error
    incoming.put(end)


def _drain(waiting):
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.get_nowait()
