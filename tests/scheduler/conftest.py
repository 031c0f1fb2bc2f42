"""Fixture with the fake engine, for all tests of the scheduler, and their order."""

import pytest
from fake_engine import FakeEngine

RANDOM = ("test_random_schedules.py", "test_fuzz.py", "test_planted_bugs.py", "test_determinism.py")


@pytest.fixture(scope="session")
def fake_engine() -> type[FakeEngine]:
    return FakeEngine


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run random schedules last: a test that names the broken promise says more than the seed of a schedule."""
    ours = [number for number, item in enumerate(items) if item.path.is_relative_to(__file__.rpartition("/")[0])]
    ordered = sorted((items[number] for number in ours), key=lambda item: item.path.name in RANDOM)
    for number, item in zip(ours, ordered, strict=True):
        items[number] = item
