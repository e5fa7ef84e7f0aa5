"""Codecs: how objects of types that cannot travel are sent as values that can.

A closed table that the worker's owner fills; nothing is ever looked up but in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from zmq_autograd.errors import ConfigurationError, SerializationError
from zmq_autograd.node.forks import Held
from zmq_autograd.wire.objects import Coded
from zmq_autograd.wire.values import contains, replaced

Pack = Callable[[Any], Any]
Unpack = Callable[[Any], Any]


_PLAIN: Final = (type(None), bool, int, float, complex, str, bytes, list, tuple, dict, Held)
"""What messages are made of, which no codec may stand for."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How objects of one type travel.

    Attributes:
        name: what sender and receiver call it.
        pack: makes a value that can travel of an object; or returns the object, which then travels
            as it is.
        unpack: makes an object of that value again.
    """

    name: str
    pack: Pack
    unpack: Unpack


class Codecs:
    """The codecs of one worker."""

    def __init__(self, worker: str) -> None:
        """Make an empty table for the worker named `worker`."""
        self.worker = worker
        self._by_type: dict[type, Codec] = {}
        self._by_name: dict[str, Codec] = {}

    def add(self, kind: type, name: str | None, pack: Pack, unpack: Unpack) -> None:
        """Have objects of `kind` travel.

        Raises:
            ConfigurationError: `kind` is no type, or stands for what travels as it is; it or the
                name has a codec already; or one of the two cannot be called.
        """
        if not isinstance(kind, type):
            raise ConfigurationError(f"codec: expected a type, got {kind!r}")
        if any(issubclass(plain, kind) for plain in _PLAIN):
            raise ConfigurationError(
                f"codec: expected a type of your own, got {kind!r}, which plain values are of"
            )
        for function in (pack, unpack):
            if not callable(function):
                raise ConfigurationError(f"codec: expected a function, got {function!r}")
        name = kind.__qualname__ if name is None else name
        if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable():
            raise ConfigurationError(f"name: expected up to 200 printable characters, got {name!r}")
        if kind in self._by_type or name in self._by_name:
            raise ConfigurationError(f"there is a codec for {name!r} or its type already")
        self._by_type[kind] = self._by_name[name] = Codec(name, pack, unpack)

    def discard(self, name: str) -> None:
        """Forget the codec of that name, if there is one."""
        codec = self._by_name.pop(name, None)
        self._by_type = {kind: each for kind, each in self._by_type.items() if each is not codec}

    def codec_of(self, value: object) -> Codec | None:
        """Return the codec by which `value` travels: its type's, or that of the nearest base."""
        for kind in type(value).__mro__:
            if kind in self._by_type:
                return self._by_type[kind]
        # An abstract class may have instances that do not inherit from it.
        return next((c for kind, c in self._by_type.items() if isinstance(value, kind)), None)

    def named(self, name: str) -> Codec | None:
        """Return the codec of that name."""
        return self._by_name.get(name)

    def pack(self, value: Any) -> Any:
        """Return `value` with every object in it that has a codec packed.

        Raises:
            Exception: whatever a codec raises.
        """
        kinds = tuple(self._by_type)
        if not kinds or not contains(value, kinds):
            return value
        return replaced(value, kinds, self._packed)

    def unpack(self, value: Any) -> Any:
        """Return `value` with every packed object in it made again.

        Raises:
            SerializationError: there is no codec of that name here.
            Exception: whatever a codec raises.
        """
        return replaced(value, Coded, self._unpacked) if contains(value, Coded) else value

    def _packed(self, value: Any) -> Any:
        codec = self.codec_of(value)
        if codec is None or (packed := codec.pack(value)) is value:
            return value
        return Coded(codec.name, self.pack(packed))  # what it makes may hold further objects

    def _unpacked(self, coded: Coded) -> Any:
        codec = self.named(coded.codec)
        if codec is None:
            raise SerializationError(
                f"worker {self.worker!r} has no codec {coded.codec[:200]!r}: register it there, too"
            )
        return codec.unpack(self.unpack(coded.value))
