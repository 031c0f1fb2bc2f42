"""Private cache of built libraries: a file's name ends with a digest of name and contents, checked before each use.

Loading a library runs its code, and mapping a truncated one ends the process by SIGBUS. So the folder belongs to the
user alone, and a file is only used if it is complete.
"""

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DRAFT_PREFIX = "build-"
SETTLED = 5.0
"""Seconds after which a build folder that is not locked is abandoned: it is locked just after it is made."""
MAX_SIZE = 2**28
"""No library is larger in bytes; a file that is would only take time to read."""
UNMAPPED_UID = 65534
"""The owner that a user namespace shows for folders of the host, as the root folder of some sandboxes."""


def cache_folder() -> Path:
    """SAGELLM_CACHE_DIR, else sagellm in XDG_CACHE_HOME or ~/.cache. Raises OSError for a user without a home."""
    if chosen := os.environ.get("SAGELLM_CACHE_DIR"):
        return Path(chosen)
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if caches.is_absolute():  # the XDG specification says to ignore a relative path
        return caches / "sagellm"
    try:
        return Path.home() / ".cache" / "sagellm"
    except RuntimeError:
        raise FileNotFoundError("the home folder is unknown") from None


def private_folder() -> Path:
    """The folder of the libraries, created with mode 0700. Raises OSError if other users could change it."""
    folder = Path(os.path.realpath(cache_folder() / "kernels"))
    for path in (*reversed(folder.parents), folder):
        path.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "geteuid"):
        _require_no_replacement(folder)
        _require_private(folder)
    return folder


def _require_no_replacement(folder: Path) -> None:
    """Raises PermissionError if another user could rename a parent of the folder and create another in its place."""
    for parent in reversed(folder.parents):
        status = parent.stat()
        if status.st_uid not in (os.geteuid(), 0, UNMAPPED_UID):
            raise PermissionError(f"{parent} belongs to another user")
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise PermissionError(f"all users can rename files in {parent}: its sticky bit is not set")
        if not status.st_mode & (stat.S_IXGRP | stat.S_IXOTH):
            return  # other users cannot reach what follows


def _require_private(folder: Path) -> None:
    """Raises PermissionError unless only this user or root can write; takes access by others away."""
    status = folder.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        with suppress(OSError):  # a read-only folder that others only read is fine
            folder.chmod(0o700)
        status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{folder} belongs to another user")
    if status.st_mode & 0o022:
        raise PermissionError(f"other users can write to {folder}")


def find_library(folder: Path, prefix: str, accepts: Callable[[str], bool] = lambda name: True) -> Path | None:
    """The newest intact library with an accepted name of this prefix. Damaged ones are deleted. Raises OSError."""
    with os.scandir(folder) as entries:
        named = [entry for entry in entries if entry.name.startswith(prefix) and entry.name.endswith(".so")]
    found = [entry for entry in named if accepts(entry.name)]
    found.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime_ns, reverse=True)
    for path in (Path(entry) for entry in found):
        if _is_intact(path):
            return path
        with suppress(OSError):
            path.unlink()
    return None


def store_library(built: Path, folder: Path, prefix: str) -> Path:
    """Moves a built library into the folder; it has its name only when its contents are on disk. Raises OSError."""
    with built.open("rb") as file:
        os.fchmod(file.fileno(), 0o600)
        os.fsync(file.fileno())
        contents = file.read()
    library = folder / f"{prefix}{_digest(prefix, contents)}.so"
    built.replace(library)
    _sync_folder(folder)
    return library


@contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder` for one build. Deletes those of processes that were killed. Raises OSError."""
    _remove_abandoned(folder)
    with tempfile.TemporaryDirectory(prefix=DRAFT_PREFIX, dir=folder, ignore_cleanup_errors=True) as made:
        draft = Path(made)
        lock = os.open(draft, os.O_RDONLY)
        try:
            _lock(lock)
            yield draft
        finally:
            os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    for draft in folder.glob(f"{DRAFT_PREFIX}*"):
        with suppress(OSError):
            if time.time() - draft.stat().st_mtime > SETTLED and _is_unlocked(draft):
                shutil.rmtree(draft, ignore_errors=True)


def _is_unlocked(draft: Path) -> bool:
    lock = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        return _lock(lock)
    finally:
        os.close(lock)


def _lock(descriptor: int) -> bool:
    """Locks a folder until the descriptor is closed or the process ends; False if that fails or it is locked."""
    import fcntl  # not available on Windows, where no kernels are built

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_intact(path: Path) -> bool:
    """Whether the path is a regular file that only we can write, with the contents that its name declares."""
    prefix, _, digest = path.name.removesuffix(".so").rpartition("-")
    try:
        # A FIFO must not block, and a link may point to a file of another user.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
            status = os.fstat(file.fileno())
            is_ours = status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022
            if not is_ours or not stat.S_ISREG(status.st_mode) or status.st_size > MAX_SIZE:
                return False
            return _digest(f"{prefix}-", file.read()) == digest
    except OSError:
        return False


def _digest(prefix: str, contents: bytes) -> str:
    """Includes the name, so that a library is not taken for another one."""
    return hashlib.sha256(prefix.encode() + b"\0" + contents).hexdigest()[:32]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
