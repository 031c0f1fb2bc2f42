"""Fixtures of the server's tests: one LLM, and one server with it."""

from collections.abc import Iterator

import pytest
from servers import MODEL, TestServer, engine_channel, running

from sageLLM import LLM


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The reference, for expected answers."""
    return LLM(MODEL, dtype="float32")


@pytest.fixture(scope="session")
def served_llm() -> LLM:
    return LLM(MODEL, dtype="float32", skip_tokenizer=True)


@pytest.fixture(scope="session")
def server(served_llm: LLM) -> Iterator[TestServer]:
    with running(lambda: engine_channel(served_llm), tool_call_parser="hermes") as found:
        yield found
    assert not served_llm.engine.has_work
    served_llm.engine.scheduler.check_integrity()
