"""Fixtures of the generator's tests: the package's specs, linked once per process."""

import pytest

from sageLLM.codegen.link.memo import LinkMemo


@pytest.fixture(scope="session")
def memo() -> LinkMemo:
    """An argument of `driver.load_and_link`, which then links only what earlier tests have not linked."""
    return LinkMemo()
