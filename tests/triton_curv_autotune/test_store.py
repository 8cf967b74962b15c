"""Files of entries: what is written is read, races lose nothing, damage is a miss."""

import dataclasses
import json
import os
import random
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import light_processes
from tests.support.store_race import SHARED, own_problem, published, race
from tests.support.tuning import (
    FACTOR,
    FACTORS,
    FAKE,
    MOMENTUM,
    PATCH,
    conv_problem,
    entry_for,
    factor_problem,
    list_problem,
    other_config,
    resolver_on,
)
from triton_curv_autotune import InvalidEntryError, TuningWarning
from triton_curv_autotune.entry import from_json
from triton_curv_autotune.key import digest, environment, file_of
from triton_curv_autotune.registry import get_op
from triton_curv_autotune.store import Store, default_store
from triton_curv_kernels.factor_group_config import GroupProblem

PROBLEM = factor_problem()
LIST = GroupProblem(((1024, 64, 2), (4096, 576, 1)), torch.bfloat16, FAKE, ones=True)
STORED: list[tuple[str, Any]] = [(FACTOR, PROBLEM), (FACTORS, LIST), (PATCH, conv_problem(limits=FAKE))]


@lru_cache
def entry(name: str = FACTOR, problem: Any = PROBLEM) -> Any:
    return entry_for(name, problem, other_config(name, problem))


def file_in(root: Path, name: str = FACTOR, problem: Any = PROBLEM) -> Path:
    return root / file_of(entry(name, problem).key)


def source(root: Path, name: str = FACTOR, problem: Any = PROBLEM) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)
        choice = resolver_on(root).explain_choice(name, problem)
    assert get_op(name).supports(choice.config, problem)
    return choice.source


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = entry()
    Store(tmp_path).write(written)
    assert list(Store(tmp_path).entries(environment(FAKE))) == [written]
    (path,) = (p for p in tmp_path.rglob("*") if p.is_file())
    assert path == file_in(tmp_path)
    assert json.loads(path.read_bytes())["environment"]["device"] == "Fake GPU"
    umask = os.umask(0o022)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_folders_come_from_the_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CURV_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("TRITON_CURV_CACHE_PATH", f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}")
    assert default_store() == Store(tmp_path / "own", (tmp_path / "a", tmp_path / "b"))
    monkeypatch.delenv("TRITON_CURV_CACHE_DIR")
    monkeypatch.delenv("TRITON_CURV_CACHE_PATH")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store() == Store(tmp_path / "triton_curv")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path).write(entry())
    before = file_in(tmp_path).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Store(tmp_path).write(dataclasses.replace(entry(), measurements=()))
    assert [p.name for p in file_in(tmp_path).parent.iterdir()] == [file_in(tmp_path).name]
    assert file_in(tmp_path).read_bytes() == before


def test_clear_deletes_the_files_of_an_environment(tmp_path: Path) -> None:
    mine = entry()
    other = dataclasses.replace(mine, environment=dataclasses.replace(mine.environment, triton="0.0"))
    for item in (mine, other):
        Store(tmp_path).write(item)
    assert Store(tmp_path).clear(mine.environment) == 1
    assert source(tmp_path) == "default"
    assert Store(tmp_path).clear() == 1
    assert list(tmp_path.rglob("*.json")) == []


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: 8000 fsyncs of a disk take a minute."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK):
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            yield Path(folder)
    else:
        yield tmp_path


def test_eight_processes_lose_nothing_and_read_no_torn_file(memory_path: Path) -> None:
    for problem in SHARED:
        Store(memory_path).write(published(problem, 0, 0))
    with ProcessPoolExecutor(8, mp_context=light_processes()) as pool:
        faults = list(pool.map(race, [str(memory_path)] * 8, range(8), [1000] * 8))
    assert faults == [0] * 8
    found = {e.problem for e in Store(memory_path).entries(environment(FAKE))}
    assert found == {*SHARED, *(own_problem(worker) for worker in range(8))}
    assert all(path.suffix == ".json" for path in memory_path.rglob("*") if path.is_file())  # no .bad, no .tmp


# damage: takes the path of a good file and a random generator


def truncated(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def bit_flipped(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def noise(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.randrange(2000)))


def changed_value(path: Path, rng: random.Random) -> None:
    """Another value anywhere, with a digest that fits: only the checks of types, keys and configs can tell."""
    content = json.loads(path.read_bytes())
    values: list[Any] = [None, True, -1, 0, 3, 2**62, 2**200, 1.5, 1e308, "", "float32", "x" * 500, [], {}, [[[]]]]
    content.pop("digest")
    part, name = rng.choice(_places(content))
    part[name] = rng.choice([v for v in values if v != part[name] or type(v) is not type(part[name])])
    content["digest"] = digest(content)
    path.write_text(json.dumps(content))


def _places(content: Any) -> list[tuple[Any, Any]]:
    if not isinstance(content, dict | list):
        return []
    names = list(content) if isinstance(content, dict) else list(range(len(content)))
    return [(content, name) for name in names] + [p for name in names for p in _places(content[name])]


def nested(path: Path, rng: random.Random) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000)


def numbers_too_large(path: Path, rng: random.Random) -> None:
    path.write_text(rng.choice(['{"schema": 1e999}', '{"schema": ' + "9" * 5000 + "}", '{"schema": NaN}']))


def huge(path: Path, rng: random.Random) -> None:
    os.truncate(path, 1 << 33)  # sparse


def symlink(path: Path, rng: random.Random) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(rng.choice([str(target), path.name, "/dev/zero", "/etc/passwd", "absent"]))


def no_regular_file(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkdir(path) if rng.random() < 0.5 else os.mkfifo(path)


def unreadable(path: Path, rng: random.Random) -> None:
    """As another owner's umask leaves it; root reads it all the same, so its content is damaged as well."""
    bit_flipped(path, rng)
    path.chmod(rng.choice([0o000, 0o200, 0o077]))
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)


def foreign(path: Path, rng: random.Random) -> None:
    """A good entry of another problem under this name."""
    path.write_bytes(entry_for(FACTOR, factor_problem(k=64, n=16), get_op(FACTOR).configs[0]).to_bytes())


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    *[truncated, bit_flipped, noise, changed_value, nested, numbers_too_large],
    *[huge, symlink, no_regular_file, unreadable, foreign],
]
WEIGHTS = [80, 110, 40, 190, 5, 15, 10, 20, 10, 20, 10]


def test_500_damaged_files_are_misses(tmp_path: Path) -> None:
    """Nothing raises, nothing of them is used, all are kept as .bad; a healthy file is used each time in between."""
    rng = random.Random(0)
    used: dict[str, int] = {}
    for index, damage in enumerate(rng.choices(DAMAGES, WEIGHTS, k=510)):
        root, stored = tmp_path / str(index), STORED[index % len(STORED)]
        path = file_in(root, *stored)
        Store(root).write(entry(*stored))
        damage(path, rng)
        if source(root, *stored) != "default":
            used[damage.__name__] = used.get(damage.__name__, 0) + 1
            continue
        assert path.with_name(path.name + ".bad") in list(path.parent.iterdir()), damage
        Store(root).write(entry(*stored))
        assert source(root, *stored) == "store"
    # another time, reason or day may be as good as the one that was there
    assert set(used) <= {"changed_value"}, used
    assert used.get("changed_value", 0) < 30


def test_a_good_file_that_replaced_a_bad_one_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the failed read and the renaming another process publishes."""
    Store(tmp_path).write(entry())
    path = file_in(tmp_path)
    path.write_bytes(b"torn")
    replace = os.replace

    def late(source_path: Any, target: Any) -> None:
        monkeypatch.undo()
        Store(tmp_path).write(entry())
        replace(source_path, target)

    monkeypatch.setattr(os, "replace", late)
    assert Store(tmp_path).read(path, FACTOR, environment(FAKE)) is None
    assert source(tmp_path) == "store"


def test_a_read_only_folder_is_left_alone(tmp_path: Path) -> None:
    Store(tmp_path / "shared").write(entry())
    path = file_in(tmp_path / "shared")
    path.write_bytes(b"torn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)
        assert resolver_on(tmp_path / "own", tmp_path / "shared").explain_choice(FACTOR, PROBLEM).source == "default"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_config_that_does_not_fit_the_problem_is_refused() -> None:
    """A config of the space, in a well-formed entry, but for another size: K is too short for its split."""
    good = entry_for(MOMENTUM, list_problem(), other_config(MOMENTUM, list_problem()))
    assert from_json(good.to_json(), get_op(MOMENTUM)) == good
    op = get_op(FACTOR)
    short = factor_problem(k=16)
    wide = next(c for c in op.configs if c.SPLIT_K == 128)
    with pytest.raises(InvalidEntryError, match="is no config for"):
        from_json(dataclasses.replace(entry_for(FACTOR, short, wide)).to_json(), op)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        (FACTORS, "shapes", [[1024, 64]], r"shapes\[0\] of 3 items, got 2"),
        (FACTORS, "shapes", [[1024, 64, True]], r"shapes\[0\]\[2\] of <class 'int'>, got True"),
        (FACTORS, "shapes", [[1024, 64, 2**40]], "is no config for"),
        (FACTORS, "shapes", {"0": [1024, 64, 1]}, "expected GroupProblem.shapes"),
        (PATCH, "geometry", [14, 14], "expected PatchGeometry with"),
        (PATCH, "geometry", {"sizes": [14, 14]}, "expected PatchGeometry with"),
    ],
)
def test_parts_of_a_problem_are_checked(name: str, field: str, value: Any, message: str) -> None:
    stored = dict(STORED)
    content = entry(name, stored[name]).to_json()
    content["problem"] = {**content["problem"], field: value}
    content["digest"] = digest({key: item for key, item in content.items() if key != "digest"})
    with pytest.raises(InvalidEntryError, match=message):
        from_json(content, get_op(name))
