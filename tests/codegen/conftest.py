"""What the tests of the generator share in a process: the package's specs, linked once."""

import pytest

from sageLLM.codegen.link.memo import LinkMemo


@pytest.fixture(scope="session")
def memo() -> LinkMemo:
    """An argument of `driver.load_and_link`, which then links only what earlier tests have not linked."""
    return LinkMemo()
