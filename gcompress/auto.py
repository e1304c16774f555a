"""The compressor that is yet to be chosen: `compression="auto:link=1gbit"`."""

from __future__ import annotations

import dataclasses

from .checks import shown
from .compressors.spec import parse_value
from .errors import ConfigError
from .units import duration, link_rate

NAME = "auto"


@dataclasses.dataclass(frozen=True)
class Auto:
    """Stands in a policy for the compressor that the ranks choose together, once, before anything is exchanged.

    gcompress/forecast/decide.py chooses. No tensor is ever encoded by it.

    Args:
        link: the rate of the link, such as "1gbit"; None: the ranks measure it.
        shared: whether `link` is one that all ranks share; otherwise each rank has one of that rate.
        latency: one way, such as "1ms".
        step: what a step takes without any exchange, part of which an exchange hides behind.

    >>> Auto.read("auto:link=1gbit,step=300ms").link
    '1gbit'
    """

    link: str | None = None
    shared: bool = False
    latency: str = "100us"
    step: str = "100ms"

    def __post_init__(self):
        if self.link is not None:
            link_rate(self.link, "auto: link")
        if type(self.shared) is not bool:
            raise ConfigError(f"auto: shared: got {shown(self.shared)}, expected true or false")
        if self.shared and self.link is None:
            raise ConfigError(
                "auto: shared: got true without a link, expected link=RATE: what is measured is a rank's own"
            )
        for name in ("latency", "step"):
            duration(getattr(self, name), f"auto: {name}")
            object.__setattr__(self, name, str(getattr(self, name)))

    @classmethod
    def read(cls, value: object) -> Auto | None:
        """The Auto behind its text or dict; None if it is of something else."""
        if isinstance(value, Auto):
            return value
        arguments = {}
        if isinstance(value, dict) and value.get("name") == NAME:
            arguments = {key: each for key, each in value.items() if key != "name"}
        elif isinstance(value, str) and value.partition(":")[0].strip() == NAME:
            for item in filter(None, value.partition(":")[2].split(",")):
                key, equals, text = (part.strip() for part in item.partition("="))
                if not equals or key in arguments:
                    raise ConfigError(f"auto: got {shown(item)}, expected option=value, each once")
                arguments[key] = parse_value(text) if key == "shared" else text
        else:
            return None
        known = [field.name for field in dataclasses.fields(cls)]
        for name in arguments:
            if name not in known:
                raise ConfigError(f"auto: got the option {shown(name)}, expected some of {', '.join(known)}")
        return cls(**arguments)

    def to_dict(self) -> dict:
        return {"name": NAME, **dataclasses.asdict(self)}

    def __str__(self):
        items = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                items.append(f"{field.name}={str(value).lower() if isinstance(value, bool) else value}")
        return f"{NAME}:{','.join(items)}" if items else NAME
