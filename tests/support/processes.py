"""Processes that start quickly: forked from a server that has imported torch and our packages, and nothing else."""

import multiprocessing
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any, cast

PRELOADED = [
    "tests.support.processes",
    "tests.support.sharded",
    "tests.support.store_race",
    "tests.support.killed_rank",
    "triton_curv.cli.app",
    "triton_curv.cli.train",
    "sklearn.datasets",
    "triton_curv_autotune.agree",
    "torch.distributed",
]


def light_processes() -> ForkServerContext:
    """The context; the server starts once a test run, with all modules that any test wants in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> list[Any]:
    """`work(rank, *arguments)` in a gloo group of `world` processes: what each rank returned or raised, as text."""
    context = light_processes()
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        context.Process(target=_run, args=(rank, world, port, pipes[rank][1], work, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    answers: list[Any] = ["no answer"] * world
    waiting: dict[Any, int] = {pipe: rank for rank, (pipe, _) in enumerate(pipes)}
    deadline = time.monotonic() + timeout_s
    try:
        while waiting and (ready := wait(list(waiting), deadline - time.monotonic())):
            for pipe in cast("list[Connection]", ready):
                rank = waiting.pop(pipe)
                answers[rank] = pipe.recv()
                if isinstance(answers[rank], str):  # an error: the others may wait for it in vain
                    deadline = min(deadline, time.monotonic() + 15)
        return answers
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _run(rank: int, world: int, port: int, pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        result = work(rank, *arguments)
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
    pipe.send(result)
    dist.barrier()  # the store lives in rank 0's process
    dist.destroy_process_group()
