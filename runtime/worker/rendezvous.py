"""File through which the ranks of one host find each other."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import msgspec

from sageLLM.runtime.worker.build import WorkerSpec


class RendezvousFile:
    """An empty file for the `FileStore` of torch.distributed.

    On Linux it has no name, and is gone with the last process that has it open, however that ends. Elsewhere it is in a
    folder that only this user can read, until `close`.
    """

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("sagellm-rendezvous") if hasattr(os, "memfd_create") else None
        self._folder = Path(tempfile.mkdtemp(prefix="sagellm-")) if self._descriptor is None else None

    def added_to(self, spec: WorkerSpec) -> WorkerSpec:
        """The spec of ranks that use this file."""
        path = None if self._folder is None else str(self._folder / "rendezvous")
        return msgspec.structs.replace(spec, rendezvous=path, rendezvous_file=self._descriptor)

    def close(self) -> None:
        """Gives the file up. Ranks that have a descriptor keep it; others must be connected."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._descriptor = self._folder = None
