"""What type checkers are told of the blocking surface is what it is made of."""

from tests.unit.blocking.stub import STUB, Writer


def test_the_stub_is_that_of_the_classes() -> None:
    assert STUB.read_text() == Writer().write(), "run `python -m tests.unit.blocking.stub`"
