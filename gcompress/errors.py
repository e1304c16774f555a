"""Every error gcompress raises on purpose; each is also the standard exception one would expect."""


class GcompressError(Exception):
    """Base class of the errors below."""


class ConfigError(GcompressError, ValueError):
    """An argument, spec string or configuration that cannot be used; names it and what was expected."""


class PayloadError(GcompressError, ValueError):
    """Bytes that no compressor of this configuration can have produced."""


class ConfigMismatchError(GcompressError, RuntimeError):
    """Ranks of one job were configured differently; names both configurations."""


class ExchangeError(GcompressError, RuntimeError):
    """An exchange that cannot be completed; the message says what to change."""
