"""Values that stand for what cannot travel itself: an RRef, and an object of a registered codec.

Owns what is said of them; what becomes of it is the receiver's to decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Reference:
    """An RRef on its way to another holder (torch: ``RRefForkData``).

    Attributes:
        owner: the name of the worker where the value is.
        incarnation: which life of it.
        rref_id: the value.
        fork_id: the new holder's reference.
        endpoints: where the owner may be reached.
    """

    owner: str
    incarnation: str
    rref_id: int
    fork_id: int
    endpoints: Sequence[str] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """An object, as a codec packed it.

    Attributes:
        codec: the name under which sender and receiver registered the codec.
        value: what can travel of the object.
    """

    codec: str
    value: Any
