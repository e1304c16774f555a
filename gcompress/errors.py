"""Every error gcompress raises on purpose; each is also the standard exception one would expect."""


class GcompressError(Exception):
    """Base class of the errors below."""


class ConfigError(GcompressError, ValueError):
    """An argument, spec string or configuration that cannot be used; names it and what was expected."""


class PayloadError(GcompressError, ValueError):
    """Bytes that cannot be decoded: no compressor of this configuration makes them. Decoding raises no other error."""


class ConfigMismatchError(GcompressError, RuntimeError):
    """Ranks of one job were configured differently; names both configurations."""


class ExchangeError(GcompressError, RuntimeError):
    """An exchange that cannot be finished; the message says what to change."""


class LinkError(GcompressError, ConnectionError):
    """A peer that cannot be reached, keeps silent beyond a deadline, or was lost."""


class RefusedError(LinkError):
    """One side of a connection refused the other; the message says why."""


class ServerError(RefusedError):
    """The server failed at a request; the message names its error. Neither half has carried the request out."""


class RolledBack(GcompressError, RuntimeError):
    """Not a failure: one half of the model was lost, and both are back at `step`. Go on from there."""

    def __init__(self, step):
        super().__init__(f"both halves stand at step {step} again: go on from there")
        self.step = step


class NotFiniteError(ExchangeError):
    """What was exchanged is not finite on some rank; every rank is told."""
