"""Ranks that choose alike: tuning shared out, then one table for all.

What ranks tell each other goes through the process group's key-value store and not through collectives: it works for
NCCL and gloo alike, occupies no GPU, and who is missing has a name.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import triton

from triton_curv_autotune.entry import Entry, from_json
from triton_curv_autotune.errors import AgreementError, InvalidEntryError
from triton_curv_autotune.key import canonical, digest, encode, local_devices
from triton_curv_autotune.registry import get_op, op_names
from triton_curv_autotune.resolve import Resolver, process
from triton_curv_autotune.tune import Job, plan, tune
from triton_curv_autotune.validate import member, parse
from triton_curv_kernels.backend import DeviceLimits

TIMEOUT = timedelta(minutes=10)
FIRST_POLL_S = 0.001
LAST_POLL_S = 0.1


@dataclass
class _Board:
    """Where the ranks of a group post what they have to say, in one round of talk."""

    store: Any
    rank: int
    world: int
    prefix: str
    timeout: timedelta

    def exchange(self, topic: str, content: str) -> list[str]:
        """Post, wait for all, return all posts by rank.

        Raises:
            AgreementError: a rank told that it failed, or posted nothing in time.

        """
        self.store.set(f"{self.prefix}/{topic}/{self.rank}", content)
        return [self._wait(topic, rank) for rank in range(self.world)]

    def _wait(self, topic: str, rank: int) -> str:
        deadline, pause = time.monotonic() + self.timeout.total_seconds(), FIRST_POLL_S
        while not self._posted(topic, rank):
            if self._posted("failed", rank):
                raise AgreementError(f"'{topic}': rank {rank} failed: {self._read('failed', rank)}")
            if time.monotonic() > deadline:
                missing = [r for r in range(self.world) if not self._posted(topic, r)]
                raise AgreementError(
                    f"'{topic}': rank {self.rank} waited {self.timeout.total_seconds():g} s for ranks {missing} of "
                    f"{self.world}; they have died, hang, or were not told to join"
                )
            time.sleep(pause)
            pause = min(2 * pause, LAST_POLL_S)
        return self._read(topic, rank)

    def _posted(self, topic: str, rank: int) -> bool:
        found: bool = self.store.check([f"{self.prefix}/{topic}/{rank}"])
        return found

    def _read(self, topic: str, rank: int) -> str:
        content: bytes = self.store.get(f"{self.prefix}/{topic}/{rank}")
        return content.decode()

    @contextmanager
    def telling_failure(self) -> Iterator[None]:
        """Let the others know of an error that they would not find by themselves."""
        try:
            yield
        except BaseException as error:
            self.store.set(f"{self.prefix}/failed/{self.rank}", f"{type(error).__name__}: {error}")
            raise


_rounds: dict[str, int] = {}


def _board(group: dist.ProcessGroup | None, timeout: timedelta) -> _Board:
    group = group or dist.group.WORLD
    if group is None:
        raise AgreementError("expected an initialised process group: call torch.distributed.init_process_group first")
    name = group.group_name
    _rounds[name] = _rounds.get(name, 0) + 1
    store = dist.distributed_c10d._get_default_store()
    prefix = f"triton_curv/agree/{name}/{_rounds[name]}"
    return _Board(store, dist.get_rank(group), dist.get_world_size(group), prefix, timeout)


def split(jobs: Sequence[Job], rank: int, world: int) -> list[Job]:
    """The share of a rank: every world-th job in the order of keys, whatever order they came in."""
    ordered = sorted(jobs, key=lambda job: (job.op.name, digest(encode(job.problem))))
    return ordered[rank::world]


def sync(
    group: dist.ProcessGroup | None = None,
    timeout: timedelta = TIMEOUT,
    *,
    devices: Sequence[DeviceLimits] | None = None,
    resolver: Resolver = process,
) -> int:
    """Let all ranks of `group` hold the same table, so that they choose alike; all must call it.

    Every entry of any rank is taken; where ranks differ in one, the lowest rank's counts. From then on files of the
    local machine are not read. Ranks on different devices keep tables for all of them.

    Returns:
        How many entries the table has now.

    Raises:
        AgreementError: a rank failed, is missing, or runs other kernels; the message names it.

    """
    board = _board(group, timeout)
    with board.telling_failure():
        return _sync(board, local_devices() if devices is None else devices, resolver)


def _sync(board: _Board, devices: Sequence[DeviceLimits], resolver: Resolver) -> int:
    own = {canonical(e.key): e.to_json() for limits in devices for e in resolver.entries(limits)}
    code = digest([triton.__version__, {name: get_op(name).source for name in op_names()}])
    summaries = [json.loads(post) for post in board.exchange("digest", json.dumps([code, digest(own)]))]
    _require_equal("kernel files or Triton version", [summary[0] for summary in summaries])
    merged = own
    if len({summary[1] for summary in summaries}) > 1:
        merged = {}
        for post in reversed(board.exchange("entries", json.dumps(own))):
            merged |= json.loads(post)
    _install(merged, devices, resolver)
    now = {canonical(e.key): e.to_json() for limits in devices for e in resolver.entries(limits)}
    _require_equal("tables", board.exchange("result", digest(now)))
    return len(now)


def _install(merged: Mapping[str, Any], devices: Sequence[DeviceLimits], resolver: Resolver) -> None:
    entries = []
    for data in merged.values():
        try:
            entries.append(from_json(parse(canonical(data).encode()), get_op(member(data, "op", str))))
        except InvalidEntryError as error:
            raise AgreementError(f"a rank sent an entry that can't be used: {error}") from None
    by_device: dict[DeviceLimits, list[Entry]] = {limits: [] for limits in devices}
    for entry in sorted(entries, key=lambda e: canonical(e.key)):
        by_device.setdefault(entry.environment.limits(), []).append(entry)
    for limits, found in by_device.items():
        resolver.replace(limits, found)


def _require_equal(what: str, values: Sequence[str]) -> None:
    others = [rank for rank, value in enumerate(values) if value != values[0]]
    if others:
        raise AgreementError(f"ranks {others} have other {what} than rank 0")


def tune_together(
    problems: Iterable[tuple[str, Any]],
    budget_s: float = 120.0,
    group: dist.ProcessGroup | None = None,
    timeout: timedelta = TIMEOUT,
    *,
    resolver: Resolver = process,
    devices: Sequence[DeviceLimits] | None = None,
    **options: Any,
) -> int:
    """`tune` shared out over the ranks of `group`, then `sync`; all ranks pass the same problems and budget.

    Takes the options of `tune`. A rank that fails tells the others; they raise AgreementError with its name.
    """
    board = _board(group, timeout)
    with board.telling_failure():
        jobs = split(plan(problems, resolver), board.rank, board.world)
        tune([(job.op.name, job.problem) for job in jobs], budget_s, resolver=resolver, **options)
        board.exchange("tuning", "done")
        return _sync(board, local_devices() if devices is None else devices, resolver)
