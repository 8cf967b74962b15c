"""A run of `triton-curv train` whose rank 1 dies once, in the middle of a step, given a file that is not there yet."""

import os
import sys
from pathlib import Path
from typing import Any

from triton_curv.cli import main
from triton_curv.training.trainer import Trainer

DIES_AT = 13  # in the second epoch of eleven steps


def dying(step: Any, marker: Path) -> Any:
    def stepped(trainer: Trainer, batch: Any) -> Any:
        if os.environ["RANK"] == "1" and trainer.step_count == DIES_AT and not marker.exists():
            marker.touch()
            trainer.model(batch[0])  # the others wait for this rank's gradients
            os._exit(9)
        return step(trainer, batch)

    return stepped


def run_command(rank: int, world: int, port: int, folder: str, arguments: list[str]) -> None:
    """The command as rank `rank`; what it prints goes to a file."""
    file = os.open(Path(folder, f"{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    Trainer.step = dying(Trainer.step, Path(sys.argv[1]))  # type: ignore[method-assign]  # the fault
    sys.exit(main(sys.argv[2:]))
