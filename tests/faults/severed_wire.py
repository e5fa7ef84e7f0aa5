"""Two hosts joined by a wire, which is pulled out while one waits for the other.

A script of its own, because it runs inside a network namespace that `test_worker_loss` made for
it: the wire's ends live there and in a second one, and are gone with the last process, whatever
happens.  Alice, who has dialled bob, and carol, whom bob has dialled, live in this process.  The
last line printed is JSON: the seconds after which each caller learned that bob is lost.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Final

import zmq_autograd as za
from tests.faults.victims import Callers, Victim, called_back

HERE: Final = "10.78.0.1"
THERE: Final = "10.78.0.2"

# The victim starts once its namespace has an address; `exec` keeps its process id.
WAITING: Final = 'echo waiting && read -r go && exec "$@"'
CALLERS: Final = 5


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10)


def ip_there(victim: Victim, *arguments: str) -> None:
    inside = ["nsenter", f"--target={victim.pid}", "--net"]
    subprocess.run([*inside, "ip", *arguments], check=True, timeout=10)


def join(bob: Victim) -> None:
    assert bob.heard() == "waiting"
    ip("link", "set", "lo", "up")
    ip("link", "add", "here", "type", "veth", "peer", "name", "there", "netns", str(bob.pid))
    ip("address", "add", f"{HERE}/24", "dev", "here")
    ip("link", "set", "here", "up")
    ip_there(bob, "address", "add", f"{THERE}/24", "dev", "there")
    ip_there(bob, "link", "set", "there", "up")


async def losses(bob: Victim) -> list[float]:
    carol = za.Worker("carol", f"tcp://{HERE}:7000", insecure=True)
    async with called_back(carol) as caller, za.Worker("alice") as alice:
        bob.say("go")
        await asyncio.to_thread(bob.started)
        both = await alice.connect(bob.endpoint), await caller
        callers = [Callers(remote, CALLERS) for remote in both]
        await both[0].call("waiting", 2 * CALLERS)
        struck = time.monotonic()
        # Its end of the wire: this one's routes stay, so that nothing here can tell.
        ip_there(bob, "link", "set", "there", "down")
        return [seconds for each in callers for seconds in await each.losses(struck)]


async def main() -> None:
    bob = Victim(
        "bob",
        "--insecure",
        "--dial",
        f"tcp://{HERE}:7000",
        listen=f"tcp://{THERE}:0",
        within=["unshare", "--net", "sh", "-c", WAITING, "sh"],
    )
    try:
        join(bob)
        seconds = await losses(bob)
    finally:
        bob.close()
    sys.stdout.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
