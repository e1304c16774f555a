"""The server's end of the link: a gRPC service that knows its clients and waits for none for ever."""

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

LONGEST_DETAILS = 2000  # bytes; gRPC's cap on what a status may say is 8 KiB, and it writes some as three
WATCH_SECONDS = 0.2
_log = logging.getLogger(__name__)


class Retry(Exception):
    """What a client should try again."""


class Connection:
    """One stream: who is at its other end, and by when he has to say something.

    name: the client's, or None where nothing but he himself tells. session: the server's
    to set, once the handshake is done.
    """

    def __init__(self, context, name, handshake_deadline):
        self.context, self.name, self.session = context, name, None
        self.due = time.monotonic() + handshake_deadline
        self.why = f"no handshake within {handshake_deadline:g} s"

    def expect(self, seconds, why):
        """Set when the client is overdue (None: it is the server's turn) and what is said then."""
        self.due, self.why = None if seconds is None else time.monotonic() + seconds, why

    @property
    def alive(self):
        return self.context.is_active()

    def end(self):
        self.context.cancel()


class Service:
    """Listens, authenticates, and hands frames to a SplitServer.

    Args:
        answer: function of (connection, frame), returns the answering frame.
        limits: function of a connection, returns {Kind: largest body} of what may come.
        gone: function of a connection that ended.
        deadline: seconds a client may take over each MiB of a frame, sent or read, or over a smaller frame.
        idle: seconds a client may be silent between frames.
        handshake_deadline: seconds in which a stranger must have made himself known.
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
        # A thread serves one stream; some more, so that strangers do not keep clients out while they are refused.
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
        """End all streams, at the latest after `grace` seconds."""
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
        """Who the certificate or the token says it is; None where neither is asked for. Refuses all others."""
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
        """Tell the client of an error that nobody meant, and this side's log where it was."""
        _log.error("client %s at %s: %s failed", connection and connection.name, context.peer(), what, exc_info=error)
        # INTERNAL alone may be gRPC's own word for a lost connection, which is worth another try.
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
    """A request (its kind, and in words) failed for its cause, an error of a type that is not expected there."""


def _details(error):
    """What a status says, in as many bytes as it may."""
    return str(error).encode("utf-8", "backslashreplace")[:LONGEST_DETAILS].decode("utf-8", "ignore")
