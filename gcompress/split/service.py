"""The server's end of the link: a gRPC service that checks who its clients are. Every wait has a deadline."""

import concurrent.futures
import contextlib
import logging
import threading
import time
import traceback

import grpc

from ..errors import ConfigError, ExchangeError, LinkError, PayloadError, RefusedError
from . import security, wire
from .link import FAILED, METHOD, channel_options
from .rounds import RoundOver
from .traffic import FrameCounter, SocketCounter

LONGEST_DETAILS = 2000  # bytes; gRPC's limit for the text of a status is 8 KiB, and it writes some bytes as three
WATCH_SECONDS = 0.2
_log = logging.getLogger(__name__)


class Retry(Exception):
    """The client should try again."""


class Connection:
    """One stream: which client is at its other end, and by when that client must send something.

    name: the client's, or None if only its handshake tells. session: set by the server after the
    handshake.
    """

    def __init__(self, context, name, handshake_deadline):
        self.context, self.name, self.session = context, name, None
        self.due = time.monotonic() + handshake_deadline
        self.why = f"no handshake within {handshake_deadline:g} s"

    def expect(self, seconds, why):
        """Set how long the client may take (None: it is the server's turn), and what the log says if it is late."""
        self.due, self.why = None if seconds is None else time.monotonic() + seconds, why

    @property
    def alive(self):
        return self.context.is_active()

    def end(self):
        self.context.cancel()


class Service:
    """Listens, authenticates, and hands frames to a SplitServer.

    Args:
        answer: function of (connection, frame) that returns the answer, a frame.
        limits: function of a connection that returns {Kind: largest body} of the frames that may come.
        gone: function of a connection that ended.
        deadline: seconds in which a client must send or read each MiB of a frame, or a smaller frame.
        idle: seconds for which a client may be silent between frames.
        handshake_deadline: seconds in which a new connection must complete its handshake.
    """

    def __init__(self, answer, limits, gone, *, deadline=60.0, idle=600.0, handshake_deadline=5.0):
        self._answer, self._limits, self._gone = answer, limits, gone
        self._deadline, self._idle, self._handshake_deadline = deadline, idle, handshake_deadline
        self._connections, self._lock = set(), threading.Lock()
        self._server = None
        self._stopping = threading.Event()
        self.frames = FrameCounter()

    def listen(self, address, *, ca, certificate, key, tokens, insecure, clients):
        """Begin to serve; returns the port. Arguments as `SplitServer.listen`."""
        self._mutual, self._tokens = bool(ca), None if tokens is None else security.check_tokens(tokens)
        credentials = security.server_credentials(address, ca, certificate, key, tokens, insecure)
        # One thread serves one stream. There are more than clients, so that strangers who are refused block no client.
        pool = concurrent.futures.ThreadPoolExecutor(clients + 8, thread_name_prefix="split")
        options = [*channel_options(), ("grpc.so_reuseport", 0)]
        options += [("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000)]
        self._server = grpc.server(pool, options=options, maximum_concurrent_rpcs=clients + 8)
        handler = grpc.stream_stream_rpc_method_handler(self._stream)
        service, method = METHOD.strip("/").split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise LinkError(f"cannot listen at {address}: is something else listening there?")
        self.sockets = SocketCounter(port, server=True)
        self._server.start()
        threading.Thread(target=self._watch, daemon=True).start()
        return port

    def stop(self, grace):
        """End all streams, after `grace` seconds at the latest."""
        self._stopping.set()
        if self._server:
            with contextlib.suppress(OSError):
                self.sockets.read()
            self._server.stop(grace).wait()

    def _watch(self):
        while not self._stopping.wait(WATCH_SECONDS):
            now = time.monotonic()
            with self._lock:
                overdue = [c for c in self._connections if c.due is not None and c.due < now]
            for connection in overdue:
                _log.warning("client %s: %s", connection.name, connection.why)
                connection.end()

    def _client_name(self, context):
        """The client's name, from its certificate or token; None if neither is required. Refuses any other client."""
        if self._tokens:
            metadata = dict(context.invocation_metadata())
            scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
            name = security.token_owner(self._tokens, token) if scheme == "Bearer" else None
            if name is None:
                what = "the token is not one of this server's" if scheme else "expected a token, got none"
                raise _Unauthenticated(what)
            return name
        if self._mutual:
            names = context.auth_context().get("x509_common_name", [])
            try:
                return security.check_name(names[0].decode() if names else None)
            except (ConfigError, UnicodeDecodeError) as error:
                raise _Unauthenticated(f"the certificate's common name: {error}") from None
        return None

    def _stream(self, requests, context):
        connection = None
        try:
            connection = Connection(context, self._client_name(context), self._handshake_deadline)
            with self._lock:
                self._connections.add(connection)
            yield from self._frames(requests, connection)
        except _Unauthenticated as error:
            self._abort(context, connection, grpc.StatusCode.UNAUTHENTICATED, error)
        except PayloadError as error:
            self._abort(context, connection, grpc.StatusCode.INVALID_ARGUMENT, error)
        except (RefusedError, ConfigError, ExchangeError) as error:
            self._abort(context, connection, grpc.StatusCode.FAILED_PRECONDITION, error)
        except RoundOver as error:
            self._abort(context, connection, grpc.StatusCode.ABORTED, error)
        except Retry as error:
            self._abort(context, connection, grpc.StatusCode.UNAVAILABLE, error)
        except _Failed as error:
            self._fail(context, connection, *error.args, error.__cause__)
        except grpc.RpcError:
            pass  # the client is gone
        except Exception as error:
            self._fail(context, connection, "STREAM", "the stream", error)
        finally:
            if connection:
                with self._lock:
                    self._connections.discard(connection)
                self._gone(connection)

    def _abort(self, context, connection, code, error):
        name = connection.name if connection else None
        _log.warning("client %s at %s: %s", name, context.peer(), error)
        context.abort(code, _details(error))

    def _fail(self, context, connection, kind, what, error):
        """Tell the client of an unexpected error, and log where it was raised."""
        _log.error("client %s at %s: %s failed", connection and connection.name, context.peer(), what, exc_info=error)
        # The metadata tells this from gRPC's own INTERNAL, which means a lost connection and is tried again.
        context.set_trailing_metadata(((FAILED, kind),))
        words = "".join(traceback.format_exception_only(type(error), error)).strip()
        context.abort(grpc.StatusCode.INTERNAL, _details(f"{what}: {words}"))

    def _frames(self, requests, connection):
        reader = wire.FrameReader(self._limits(connection))
        for chunk in requests:
            before = reader.progress
            for frame in reader.feed(chunk):
                connection.expect(None, "")
                self.frames.add(frame)
                answer = self._answered(connection, frame)
                reader.limits = self._limits(connection)
                self.frames.add(answer)
                for piece in wire.chunks(wire.encode(answer)):
                    connection.expect(self._deadline, f"an answer was not read within {self._deadline:g} s")
                    yield piece
                connection.expect(self._idle, f"silent for {self._idle:g} s")
            if not reader.between_frames and connection.session and reader.progress != before:
                connection.expect(self._deadline, f"a frame was not completed within {self._deadline:g} s")
        reader.close()

    def _answered(self, connection, frame):
        try:
            return self._answer(connection, frame)
        except (PayloadError, RefusedError, ConfigError, ExchangeError, RoundOver, Retry):
            raise
        except BaseException as error:  # SystemExit, too: the user's loss and callbacks run here
            raise _Failed(frame.kind.name, f"{frame.kind.name} at step {frame.step}") from error


class _Unauthenticated(Exception):
    pass


class _Failed(Exception):
    """A request failed with an unexpected error, the cause. Arguments: the request's kind, and its name in words."""


def _details(error):
    """An error's text, cut to the bytes that a status may have."""
    return str(error).encode("utf-8", "backslashreplace")[:LONGEST_DETAILS].decode("utf-8", "ignore")
