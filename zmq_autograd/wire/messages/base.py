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
    """A message that asks for exactly one reply, of the type `reply` or an `ErrorResponse`.

    Attributes:
        reply: the type of its reply.
        is_limited: it counts against `Limits.requests`.  What a backward pass needs does not: it
            would wait for calls, and passes for each other.
    """

    __slots__ = ()
    reply: ClassVar[type[Reply]]
    is_limited: ClassVar[bool] = True
