"""Folder of public traces and measurements, which are not part of the repository; tests that need it are skipped."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder in the environment variable SAGELLM_DATA (docs/simulate.md lists its contents)."""
    folder = os.environ.get("SAGELLM_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SAGELLM_DATA does not name a folder with traces")
    return Path(folder)
