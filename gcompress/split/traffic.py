"""How many bytes were sent: by the frames' sizes, and as the kernel counts at the TCP socket (Linux)."""

import contextlib
import os
import socket
import struct
import sys

TCP_INFO_BYTES = 256
COUNTERS = struct.Struct("<QQ")  # tcpi_bytes_acked, tcpi_bytes_received
COUNTERS_AT = 120


class SocketCounter:
    """Bytes that TCP carried between this process and a port, those of TLS, HTTP/2 and gRPC included.

    A sent byte counts once the other side has acknowledged it. The counts of a closed connection
    are those of the last `read`: call it before closing.

    Args:
        port: the server's.
        server: True in the server's process, False in a client's.
    """

    def __init__(self, port, server):
        self._port, self._server = port, server
        self._seen = {}

    def read(self):
        """(sent, received) over all connections so far; None if the system does not count them."""
        if not sys.platform.startswith("linux"):
            return None
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError, ValueError, struct.error):
                inode = os.readlink(f"/proc/self/fd/{name}")
                if inode.startswith("socket:"):
                    self._look(int(name), inode)
        return tuple(sum(counts) for counts in zip(*self._seen.values(), strict=True)) if self._seen else (0, 0)

    def _look(self, descriptor, inode):
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                return
            peer, own = connection.getpeername(), connection.getsockname()
            if (own if self._server else peer)[1] == self._port:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
                self._seen[inode, peer, own] = COUNTERS.unpack_from(info, COUNTERS_AT)


class FrameCounter:
    """Bytes of frames by their kind, for reports."""

    def __init__(self):
        self.bytes = {}

    def add(self, frame):
        self.bytes[frame.kind] = self.bytes.get(frame.kind, 0) + frame.nbytes

    def total(self, *kinds):
        """Bytes of these kinds so far."""
        return sum(self.bytes.get(kind, 0) for kind in kinds)
