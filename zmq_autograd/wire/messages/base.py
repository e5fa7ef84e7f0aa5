"""What all messages are: one way, a request, or the reply to one."""

from __future__ import annotations

from typing import ClassVar


class Message:
    """Base of all messages."""

    __slots__ = ()


class Reply(Message):
    """A message that ends a request."""

    __slots__ = ()


class Request(Message):
    """A message that asks for exactly one reply, of the type `reply` or an `ErrorResponse`."""

    __slots__ = ()
    reply: ClassVar[type[Reply]]
