"""Reads the JSON files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.files import read_regular_file

MAX_JSON_BYTES = 4 * 2**20
"""A bound on config files. The longest published ones, with the labels of a classifier, have about 1 MB."""


def read_json(path: Path) -> Any:
    """The value in the file. Raises CheckpointError if it cannot be read or parsed."""
    data = read_regular_file(path, MAX_JSON_BYTES)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from None
