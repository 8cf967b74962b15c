"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from triton_curv.training.errors import OutputError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace ``path`` by what ``write`` puts into a file: temporary sibling, fsync, ``os.replace``.

    Whatever happens on the way, ``path`` holds the old content or the new content, never part of one.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def require_folder(path: Path) -> None:
    """Make the folder ``path`` and check that files can be written in it.

    Raises:
        OutputError: Where that fails.

    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(f"cannot write into the folder {path}: {error.strerror}") from error


def require_replaceable(path: Path, names: Collection[str]) -> None:
    """Check that the folder ``path`` can be replaced: it is absent, or holds nothing but files in ``names``.

    Raises:
        OutputError: Where it is something else, holds something else, or its parent cannot be written.

    """
    require_folder(path.absolute().parent)
    if path.exists() and not path.is_dir():
        raise OutputError(f"expected a folder at {path}, found a file")
    others = sorted({entry.name for entry in path.iterdir()} - set(names)) if path.exists() else []
    if others:
        raise OutputError(f"{path} holds other files ({', '.join(others[:3])}): choose another folder")


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder to fill; on a clean exit it becomes ``path``, otherwise it is removed."""
    path = path.absolute()
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            _swap_folders(path, temporary)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)


def _swap_folders(path: Path, other: Path) -> None:
    """Exchange two folders of one parent; if that fails half-way, ``path`` is as it was."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.replace(path, aside)
    try:
        os.replace(other, path)
    except BaseException:
        os.replace(aside, path)
        raise
    os.replace(aside, other)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync_folder(path: Path) -> None:
    """Make a rename in ``path`` survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
