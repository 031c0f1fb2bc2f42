"""Reads the JSON files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

from sageLLM.runtime.errors import CheckpointError


def read_json(path: Path) -> Any:
    """The value in the file. Raises CheckpointError if it cannot be read or parsed."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from None
