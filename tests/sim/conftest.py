"""The folder with public traces and measurements, which is not part of the product: tests skip what is not there."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder that the environment variable SAGELLM_DATA names (docs/simulate.md says what lies in it)."""
    folder = os.environ.get("SAGELLM_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SAGELLM_DATA does not name a folder with traces")
    return Path(folder)
