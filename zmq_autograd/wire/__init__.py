"""Messages to frames and back, as pure functions.

A message is one frozen dataclass (`messages`).  On the wire it is a ZeroMQ multipart message: a
msgpack header and one raw frame per defined tensor.  A gradient of ``[1.0, 2.0]`` in float32 and an
undefined one, on their way back over message 2 of context 1::

    frame 0  87                             a map of 7
                a4 74797065 11              "type": 0x11
                aa 636f6e746578745f6964 01  "context_id": 1
                aa 6d6573736167655f6964 02  "message_id": 2
                ac 72657461696e5f6772617068 c2  "retain_graph": false
                a7 706173735f6964 00        "pass_id": 0
                a5 6772616473 92 00 c0      "grads": [0, nil]
                a7 74656e736f7273 91 93     "tensors": [[
                a7 666c6f61743332 91 02 c2      "float32", [2], false]]
    frame 1  0000803f 00000040

``docs/protocol.md`` has all of them, to the byte, and the rules.
"""

from zmq_autograd.wire.codec import Buffer, Envelope, check_fits, decode, encode, open_envelope
from zmq_autograd.wire.limits import DEFAULT_LIMITS, Limits

__all__ = [
    "Buffer",
    "DEFAULT_LIMITS",
    "Envelope",
    "Limits",
    "check_fits",
    "decode",
    "encode",
    "open_envelope",
]
