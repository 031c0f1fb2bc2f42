"""Changes a generated tree all at once: stages the files, lists them in a journal, then moves them into place.

A run that is killed before its journal is complete has changed nothing. After that point the next run carries out the
rest of the journal. Power loss is like a kill: staged files are on disk before the journal, and moved files before the
journal is removed. Staged files and journal are in `.cache` of the tree, which git ignores.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sageLLM.codegen.diagnostics import Diagnostic, SpecErrors
from sageLLM.codegen.state import FOLDER, ignore_in_git

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True, slots=True)
class Journal:
    """The rest of an update: digests of the files to move into place, and of those to remove, by path."""

    moved: Mapping[str, str]
    removed: Mapping[str, str]


def swap(files: Mapping[str, str], removed: Mapping[str, str], out: Path) -> None:
    """Writes the texts, in order, and removes files that still have the given digest. Raises SpecErrors on failure."""
    if not files and not removed:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            _complete(out)
            has_cache = (out / FOLDER).exists()
            try:
                _stage(files, removed, out)
                _complete(out)
            finally:
                if not has_cache and not is_interrupted(out):
                    shutil.rmtree(out / FOLDER, ignore_errors=True)
    except OSError as error:
        raise _disk_error(error, out) from None


def complete(out: Path) -> None:
    """Finishes the update of a run that was killed, or drops it if that run had not changed the tree yet."""
    if not _pending(out).exists():
        return
    try:
        with _locked(out):
            _complete(out)
    except OSError as error:
        raise _disk_error(error, out) from None


def is_interrupted(out: Path) -> bool:
    """Whether a run was killed while it moved files into the tree."""
    return _journal(out).exists()


def file_digest(path: Path) -> str | None:
    """The digest of a file, the same with either kind of line ends; None if it cannot be read."""
    try:
        return bytes_digest(path.read_bytes().replace(b"\r\n", b"\n"))
    except OSError:
        return None


def bytes_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def is_in_tree(path: str, out: Path) -> bool:
    """Whether a path belongs to the tree at `out`, rather than to a dot-folder, another tree or a linked folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or any(part.startswith(".") for part in parts):
        return False
    folder = out
    for part in parts[:-1]:
        folder = folder / part
        if is_foreign(folder):
            return False
    return True


def is_foreign(folder: Path) -> bool:
    """Whether a folder inside a tree does not belong to it."""
    return folder.name.startswith(".") or folder.is_symlink() or (folder / MANIFEST).exists()


def _pending(out: Path) -> Path:
    return out / FOLDER / "pending"


def _journal(out: Path) -> Path:
    return _pending(out) / "journal.json"


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps other runs from changing the tree. The lock ends with the process, so that a killed run leaves none."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _stage(files: Mapping[str, str], removed: Mapping[str, str], out: Path) -> None:
    pending = _pending(out)
    try:
        ignore_in_git(out / FOLDER)
        moved = {}
        for path, text in files.items():
            _check_target(out / path)
            staged, data = pending / "files" / path, text.encode()
            staged.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(data)
            moved[path] = bytes_digest(data)
        draft = pending / "journal.new"
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(json.dumps({"moved": moved, "removed": dict(removed)}).encode())
        _flush((*pending.rglob("*"), pending, pending.parent, out))
        draft.replace(_journal(out))
        _flush([pending])
    except BaseException:
        shutil.rmtree(pending, ignore_errors=True)
        raise


def _flush(paths: Iterable[Path]) -> None:
    """Waits until files, and the names in folders, are on disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _folders_of(paths: Iterable[str], out: Path) -> list[Path]:
    """The folders in which files were moved or removed, and those above them, as they may be new."""
    folders = {folder for path in paths for folder in (out / path).parents if folder.is_relative_to(out)}
    return sorted(folder for folder in folders if folder.is_dir())


def _check_target(path: Path) -> None:
    """Raises the OSError that moving a file to the path would raise, while the tree is still unchanged."""
    if path.is_dir():
        raise IsADirectoryError(0, "is a folder", str(path))
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(0, "is not a folder", str(parent))
    if not os.access(parent, os.W_OK):
        raise PermissionError(0, "is not writable", str(parent))


def _complete(out: Path) -> None:
    """Moves the staged files and removes old ones. Every step can be repeated, so that a kill at any point is safe."""
    journal = _read_journal(out)
    if journal is not None:
        for path, digest in journal.moved.items():
            staged = _pending(out) / "files" / path
            if file_digest(staged) == digest:  # else it was moved before
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                staged.replace(out / path)
        for path, digest in journal.removed.items():
            if file_digest(out / path) == digest:
                (out / path).unlink()
            _drop_empty_folders((out / path).parent, out)
        _flush(_folders_of([*journal.moved, *journal.removed], out))
    _journal(out).unlink(missing_ok=True)
    shutil.rmtree(_pending(out), ignore_errors=True)


def _read_journal(out: Path) -> Journal | None:
    """The journal, or None if it is missing, damaged, or names files outside the tree."""
    try:
        data = json.loads(_journal(out).read_text(encoding="utf-8"))
        journal = Journal(dict(data["moved"]), dict(data["removed"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_sound = all(is_in_tree(path, out) for path in (*journal.moved, *journal.removed))
    return journal if is_sound else None


def _drop_empty_folders(folder: Path, out: Path) -> None:
    while folder != out and folder.is_dir() and {path.name for path in folder.iterdir()} <= {"__pycache__"}:
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        folder.rmdir()
        folder = folder.parent


def _disk_error(error: OSError, out: Path) -> SpecErrors:
    """The finding for a failed write; only after the journal is complete may the tree have changed."""
    where = f"{error.filename} {error.strerror}" if error.errno == 0 else error.strerror
    rest = "the next run completes the update" if is_interrupted(out) else "the tree is unchanged"
    message = f"the generated files could not be written: {where}; {rest}"
    return SpecErrors(
        [Diagnostic("SAGE501", message, help="make the folder writable, free some space, or choose another --out")]
    )
