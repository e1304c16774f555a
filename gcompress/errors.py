"""Every error gcompress raises on purpose; each is also the standard exception one would expect."""


class GcompressError(Exception):
    """Base class of the errors below."""


class ConfigError(GcompressError, ValueError):
    """An argument, spec string or configuration that cannot be used; names it and what was expected."""


class PayloadError(GcompressError, ValueError):
    """Bytes that no peer or compressor of this configuration can have produced: the one error of decoding."""


class ConfigMismatchError(GcompressError, RuntimeError):
    """Ranks of one job were configured differently; names both configurations."""


class ExchangeError(GcompressError, RuntimeError):
    """An exchange that cannot be completed; the message says what to change."""


class LinkError(GcompressError, ConnectionError):
    """A peer that cannot be reached, keeps silent beyond a deadline, or was lost."""


class RefusedError(LinkError):
    """A peer that this side, or that refused this side; the message says for what."""


class ServerError(RefusedError):
    """A server that failed at a request: it names the error there; neither half has carried the request out."""


class RolledBack(GcompressError, RuntimeError):
    """Not a failure: a half was lost, and both stand at `step` again; go on from there."""

    def __init__(self, step):
        super().__init__(f"both halves stand at step {step} again: go on from there")
        self.step = step
