"""Fixture with the fake engine, for all tests of the scheduler."""

import pytest
from fake_engine import FakeEngine


@pytest.fixture(scope="session")
def fake_engine() -> type[FakeEngine]:
    return FakeEngine
