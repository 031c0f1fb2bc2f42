"""Reads files of untrusted folders: regular files of bounded size only."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sageLLM.runtime.errors import CheckpointError, SageError

_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_regular_file(path: Path, max_bytes: int, error: type[SageError] = CheckpointError) -> bytes:
    """The content of the file. Raises `error` for a FIFO, a device or a socket, and for more than `max_bytes` bytes.

    Symbolic links are followed, since the Hugging Face cache consists of them.
    """
    with open_regular_file(path, max_bytes, error) as file:
        data = file.read(max_bytes + 1)  # files of /proc have a size of 0
    if len(data) > max_bytes:
        raise error(f"{path} must have at most {max_bytes} bytes")
    return data


@contextlib.contextmanager
def open_regular_file(path: Path, max_bytes: int, error: type[SageError] = CheckpointError) -> Iterator[BinaryIO]:
    """The open file, with the checks of `read_regular_file`."""
    try:
        # The type is checked before opening, which can have effects on a device, and again after, as the file may have
        # been replaced. Without O_NONBLOCK, opening a FIFO waits for a writer.
        _check_type(path, path.stat(), error)
        with os.fdopen(os.open(path, _OPEN_FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            _check_type(path, status, error)
            if status.st_size > max_bytes:
                raise error(f"{path} must have at most {max_bytes} bytes, got {status.st_size}")
            yield file
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}") from None
    except ValueError as reason:  # a NUL character or half of a surrogate pair in the path
        if isinstance(reason, SageError):
            raise
        raise error(f"{path} cannot be read: {reason}") from None


def _check_type(path: Path, status: os.stat_result, error: type[SageError]) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise error(f"{path} cannot be read: Is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path} must be a regular file, got a {_KINDS.get(stat.S_IFMT(status.st_mode), 'special file')}")


_KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket"}
