"""Drafts of checkpoints that are written: a target appears when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sageLLM.runtime.errors import CheckpointError


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """A path next to `out` for a file or a folder, which becomes `out` at the end, and is removed after an error.

    Raises CheckpointError if one of them exists, or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} already exists; choose another path")
    draft = out.with_name(f"{out.name}.part")
    if draft.exists():
        raise CheckpointError(
            f"{draft} exists: another run is writing, or was killed; remove it, or choose another path"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror}") from None
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
