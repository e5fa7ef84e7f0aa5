"""How much a profile is told of other workers, and where it shows."""

from __future__ import annotations

import gzip
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import Pair
from tests.integration.fleets import Fleet
from tests.integration.profiles import (
    PROFILES,
    events_of,
    named,
    only,
    product,
    x,
)
from zmq_autograd.node.profiled import MAX_EVENTS
from zmq_autograd.node.recorder import call_named
from zmq_autograd.node.torch_events import number_workers

pytestmark = pytest.mark.timeout(60)

DOCS = Path(__file__).parents[3] / "docs"


# --- bounds --------------------------------------------------------------------------------------


def many(a: Tensor) -> Tensor:
    with torch.profiler.record_function("all of them"):
        for _ in range(3 * MAX_EVENTS):
            a = torch.neg(a)
    return a


async def test_the_longest_events_are_kept_and_the_others_counted(pair: Pair) -> None:
    pair.bob.register(many)
    with torch.profiler.profile() as profile:
        await pair.remote_bob.call("many", x)
    prefix = "call#many(alice -> bob)#remote_op: "
    kept = [e for e in events_of(profile) if e.is_remote and "left out" not in e.name]
    assert len(kept) == MAX_EVENTS
    assert only(profile, prefix + "all of them")
    # Beside the negations: `many` itself, and the range in it.
    left_out = 3 * MAX_EVENTS + 2 - MAX_EVENTS
    assert only(profile, f"{prefix}({left_out:,} shorter events left out)")


async def test_a_result_that_just_fits_comes_without_events(pair: Pair) -> None:
    text = "x" * 250_000

    def large(a: Tensor) -> str:
        many(a)
        return text

    pair.bob.register(large)
    with torch.profiler.profile() as profile:
        assert await pair.remote_bob.call("large", x) == text
    (note,) = (event for event in events_of(profile) if event.is_remote)
    assert note.name == "call#large(alice -> bob)#remote_op: (events left out)"


async def test_malformed_events_cost_no_result(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    @pair.bob.handler(za.messages.ForwardRequest)
    async def on_call(request: Any, peer: Any) -> Any:
        return za.messages.ForwardResponse(5, profiler_events={"events": "many"})

    with (
        caplog.at_level(logging.WARNING, "zmq_autograd"),
        torch.profiler.profile() as profile,
    ):
        assert await pair.remote_bob.call("product", x) == 5
    assert "worker 'bob' sent no profiler events" in caplog.text
    assert named(profile, "call#product(alice -> bob)")


async def test_a_malformed_configuration_is_an_error_there(pair: Pair) -> None:
    with pytest.raises(za.ProtocolError, match="profiler"):
        await pair.remote_bob.request(za.messages.ForwardRequest("product", [x], profiler=5))


# --- where it shows ------------------------------------------------------------------------------


async def test_the_averages_count_what_ran_there(pair: Pair) -> None:
    with torch.profiler.profile() as profile:
        for _ in range(3):
            await pair.remote_bob.call("product", x)
    averages = {average.key: average for average in profile.key_averages()}
    mm = averages["call#product(alice -> bob)#remote_op: aten::mm"]
    assert mm.count == 3
    assert mm.cpu_time_total > 0
    assert "call#product(alice -> bob)" in profile.key_averages().table(max_name_column_width=99)


@pytest.mark.parametrize("zipped", [False, True])
async def test_a_chrome_trace_has_both_sides(chain: Fleet, tmp_path: Path, zipped: bool) -> None:
    bob = await chain.way("alice", "bob")
    with torch.profiler.profile(record_shapes=True) as profile:
        with torch.profiler.record_function("around"):
            torch.relu(x)
        await bob.call("middle", x)
        torch.sigmoid(x)
    path = tmp_path / ("trace.json.gz" if zipped else "trace.json")
    profile.export_chrome_trace(str(path))
    raw = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    entries = json.loads(raw)["traceEvents"]
    by_name = {entry["name"]: entry for entry in entries if entry["ph"] == "X"}
    remote = "call#middle(alice -> bob)#remote_op: "
    mm = by_name[f"{remote}call#product(bob -> carol)#remote_op: aten::mm"]
    assert mm["pid"] == "worker carol"
    assert mm["args"]["Input Dims"] == [[2, 3], [3, 2]]
    assert by_name[remote + "aten::relu"]["pid"] == "worker bob"
    # Calls, which may overlap, are pairs of a beginning and an end.
    begin, end = (e for e in entries if e["name"] == "call#middle(alice -> bob)")
    assert (begin["ph"], end["ph"]) == ("b", "e")
    assert begin["id"] == end["id"]
    around = by_name["around"]
    assert around["pid"] == begin["pid"]
    assert around["ts"] + around["dur"] <= begin["ts"] <= mm["ts"]
    assert mm["ts"] + mm["dur"] <= end["ts"] <= by_name["aten::sigmoid"]["ts"]
    processes = [entry["args"]["name"] for entry in entries if entry["name"] == "process_name"]
    assert {"worker bob", "worker carol"} <= set(processes)


async def test_a_legacy_trace_stays_json_whatever_names_hold(pair: Pair, tmp_path: Path) -> None:
    pair.bob.register(product, 'a "quoted" \\ name')
    with PROFILES[-1]() as profile:
        await pair.remote_bob.call('a "quoted" \\ name', x)
    path = tmp_path / "trace.json"
    profile.export_chrome_trace(str(path))
    names = [entry["name"] for entry in json.loads(path.read_text())]
    assert "call#a ?quoted? ? name(alice -> bob)#remote_op: aten::mm" in names


async def test_calls_can_go_by_names_and_workers_by_numbers(
    pair: Pair, request: pytest.FixtureRequest
) -> None:
    """As torch.distributed.rpc has them."""
    number_workers({"": 0, "bob": 1})
    request.addfinalizer(lambda: number_workers({}))
    with PROFILES[-1]() as profile, call_named("rpc_async#product(w0 -> w1)"):
        await pair.remote_bob.call("product", x)
    assert only(profile, "rpc_async#product(w0 -> w1)").node_id == 0
    assert only(profile, "rpc_async#product(w0 -> w1)#remote_op: aten::mm").node_id == 1
    assert not named(profile, "rpc_async#product(w0 -> w1)#remote_op: product")


def test_the_program_in_the_docs_prints_what_they_say(tmp_path: Path) -> None:
    text = (DOCS / "observing.md").read_text(encoding="utf-8")
    [(program, printed)] = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", text, re.DOTALL)
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "program.py"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
    names = {e["name"] for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "call#stage(alice -> bob)#remote_op: aten::addmm" in names
