"""Files of measured entries: one a key, published whole, read without locks; what is damaged is a miss.

The folder is `TRITON_CURV_CACHE_DIR`, by default triton_curv in the user's cache folder; `TRITON_CURV_CACHE_PATH` lists
more folders that are only read.
"""

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from triton_curv_autotune.entry import Entry, from_bytes
from triton_curv_autotune.errors import InvalidEntryError
from triton_curv_autotune.key import SCHEMA, Environment, encode, file_of, folder_of
from triton_curv_autotune.registry import get_op, op_names
from triton_curv_autotune.validate import decode, member, parse

DIRECTORY_VARIABLE = "TRITON_CURV_CACHE_DIR"
PATH_VARIABLE = "TRITON_CURV_CACHE_PATH"
LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Store:
    """`root` is read and written, `extra` only read; what is in `root` comes first."""

    root: Path
    extra: tuple[Path, ...] = ()

    def write(self, entry: Entry) -> None:
        """Publish an entry: readers see the file that was there or this one, nothing between.

        Raises:
            OSError: the folder can't be written.

        """
        path = self.root / file_of(entry.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(entry.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def entries(self, environment: Environment) -> Iterator[Entry]:
        """All valid entries for this environment and these kernels; of two for one key the first is `root`'s."""
        for name in op_names():
            folder = folder_of(encode(environment), name, get_op(name).source)
            for top in (self.root, *self.extra):
                for path in _files(top / folder):
                    entry = self.read(path, name, environment, keep_bad=top == self.root)
                    if entry is not None:
                        yield entry

    def read(self, path: Path, op_name: str, environment: Environment, keep_bad: bool = True) -> Entry | None:
        """The entry of a file; None if there is none, which is also so for anything that is not what it should be.

        With `keep_bad` such a file is moved aside, to `<name>.bad`.
        """
        try:
            return _read(path, op_name, environment)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, InvalidEntryError):
            if keep_bad:
                self._move_aside(path, op_name, environment)
            return None

    def _move_aside(self, path: Path, op_name: str, environment: Environment) -> None:
        """Rename to `.bad`; a good file that another process put there meanwhile is put back."""
        bad = path.with_name(f"{path.name}.bad")
        with contextlib.suppress(OSError):
            os.replace(path, bad)
            with contextlib.suppress(InvalidEntryError):
                _read(bad, op_name, environment)
                os.link(bad, path)  # fails if there is a newer one, which then is the one to keep
                bad.unlink()

    def clear(self, environment: Environment | None = None) -> int:
        """Delete the files of an environment, of all without one; returns how many entries these were."""
        removed = 0
        for folder in list(self.folders()):
            name = folder.parent.name
            if environment is None or name == folder_of(encode(environment), "op", "").parent.name:
                for path in [*folder.glob("*.json"), *folder.glob("*.json.bad"), *folder.glob(".*.tmp")]:
                    with contextlib.suppress(OSError):
                        path.unlink()
                        removed += path.suffix == ".json"
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    folder.parent.rmdir()
        return removed

    def environments(self) -> list[Environment]:
        """Environments of the entries that `root` and `extra` hold, as their files say."""
        found: dict[Environment, None] = {}
        for top in (self.root, *self.extra):
            for folder in sorted(top.glob(f"v{SCHEMA}/*")):
                for path in sorted(folder.glob("*/*.json")):
                    with contextlib.suppress(OSError, InvalidEntryError):
                        stated = decode(Environment, member(parse(read_regular(path)), "environment", dict))
                        found[stated] = None
                        break
        return list(found)

    def folders(self) -> Iterator[Path]:
        """Folders of ops, of all environments and sources that `root` holds."""
        yield from sorted(path for path in self.root.glob(f"v{SCHEMA}/*/*") if path.is_dir())


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    except OSError:
        return []


def _read(path: Path, op_name: str, environment: Environment) -> Entry:
    entry, name = from_bytes(read_regular(path), get_op(op_name), environment)
    if name != path.name.removesuffix(".bad"):
        raise InvalidEntryError(f"expected the file name {name}, got {path.name}")
    return entry


def read_regular(path: Path) -> bytes:
    """Content of a regular file of sensible size; a symlink, pipe, device or folder is none.

    Raises:
        OSError: it can't be read.
        InvalidEntryError: it is no such file.

    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_FILE:
            raise InvalidEntryError(f"expected a file of at most {LARGEST_FILE} bytes at {path}")
        return file.read(LARGEST_FILE)


def default_store() -> Store:
    """The user's store, as the variables say at this moment."""
    root = os.environ.get(DIRECTORY_VARIABLE) or _users_folder()
    extra = os.environ.get(PATH_VARIABLE, "").split(os.pathsep)
    return Store(Path(root), tuple(Path(folder) for folder in extra if folder))


def _users_folder() -> str:
    """Imported here, so that a machine without the package can name a folder by the variable instead."""
    import platformdirs

    return platformdirs.user_cache_dir("triton_curv", appauthor=False)
