"""One worker's part of a distributed graph: what is recorded, and how a pass runs through it.

Torch, but no asyncio and no sockets.  Start reading at `local_pass`; docs/engine.md has the why.
"""
