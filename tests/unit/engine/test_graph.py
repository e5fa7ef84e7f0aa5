"""The graph as text: what workers tell of their parts, written down as Graphviz reads it."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from zmq_autograd.engine.graph import SendNode, WorkerGraph, to_dot

# Alice sends message 17 to bob, who sends his result as message 0x1234567890 and keeps 2 leaves.
ALICE = WorkerGraph("alice", [SendNode(17, 4096, leaves=1)], [0x1234567890])
BOB = WorkerGraph("bob", [SendNode(0x1234567890, 64, leaves=2, receives=[17])], [17])

DRAWN = r"""digraph "context 5" {
  label="context 5"
  rankdir=LR
  node [shape=box]
  subgraph cluster_0 {
    label="alice"
    w0_recv0 [label="RecvRpcBackward", tooltip="message 78187493520"]
    w0_send0 [label="SendRpcBackward\n1 leaf", tooltip="message 17"]
  }
  subgraph cluster_1 {
    label="bob"
    w1_recv0 [label="RecvRpcBackward", tooltip="message 17"]
    w1_send0 [label="SendRpcBackward\n2 leaves", tooltip="message 78187493520"]
    w1_send0 -> w1_recv0
  }
  w1_recv0 -> w0_send0 [label="00000011\n4,096 B", tooltip="message 17", labeltooltip="message 17"]
  w0_recv0 -> w1_send0 [label="34567890\n64 B", tooltip="message 78187493520", labeltooltip="message 78187493520"]
}
"""  # noqa: E501

# A string of DOT: a quote and a backslash inside stand behind a backslash.
STRING = re.compile(r'"((?:\\.|[^"\\])*)"', re.DOTALL)


def strings_in(dot: str) -> list[str]:
    """Return the strings of `dot`, each as it is shown; what else it holds must be syntax."""
    assert re.fullmatch(r"[\w\s{}\[\]=,>-]*", STRING.sub("", dot))
    return [
        re.sub(r"\\(.)", _unescaped, string).replace("&amp;", "&") for string in STRING.findall(dot)
    ]


def _unescaped(escape: re.Match[str]) -> str:
    return "\n" if escape[1] == "n" else escape[1]


def test_two_workers_are_drawn_as_written_here() -> None:
    assert to_dot(5, [ALICE, BOB]) == DRAWN


def test_the_order_in_which_workers_told_changes_nothing() -> None:
    assert to_dot(5, [BOB, ALICE]) == DRAWN


def test_a_context_that_went_nowhere_is_one_empty_cluster() -> None:
    assert strings_in(to_dot(5, [WorkerGraph("alice")])) == ["context 5", "context 5", "alice"]


def test_what_a_pass_has_freed_is_dashed_and_says_no_leaves() -> None:
    dot = to_dot(5, [WorkerGraph("bob", [SendNode(17, 4, is_freed=True)])])
    assert (
        'w0_send0 [label="SendRpcBackward", style=dashed, '
        'tooltip="message 17, whose graph a pass has freed"]'
    ) in dot


def test_a_message_whose_other_end_is_unknown_has_no_edge() -> None:
    assert "->" not in to_dot(5, [ALICE])
    assert "->" not in to_dot(5, [WorkerGraph("bob", [SendNode(1, 4, receives=[99])], [17])])


def test_the_title_says_what_is_missing() -> None:
    bob = WorkerGraph("bob", silent=["dave", "carol"], left_out=1234)
    title = strings_in(to_dot(5, [WorkerGraph("alice", silent=["dave", "bob"]), bob]))[1]
    assert title.split("\n") == [
        "context 5",
        "without worker carol, which is lost or did not answer",
        "without worker dave, which is lost or did not answer",
        "without 1,234 functions of worker bob",
    ]


def test_workers_of_one_name_are_two_clusters() -> None:
    dot = to_dot(5, [WorkerGraph("bob", receives=[1]), WorkerGraph("bob", receives=[2])])
    assert dot.count('label="bob"') == 2
    assert "w0_recv0" in dot
    assert "w1_recv0" in dot


def test_ids_that_a_peer_made_up_are_drawn_all_the_same() -> None:
    liar = WorkerGraph("liar", [SendNode(1, -1), SendNode(1, 2**70, receives=[1, 1])], [1, 1, -5])
    strings_in(to_dot(5, [liar]))


@given(st.text())
def test_any_name_stands_for_itself(name: str) -> None:
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name)
    parts = [WorkerGraph(name, [SendNode(17, 4)], [17], silent=[name + "x"])]
    strings = strings_in(to_dot(5, parts))
    assert strings[2] == shown
    assert shown in strings[1]
