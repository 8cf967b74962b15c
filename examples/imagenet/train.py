"""ResNet-50 on ImageNet by the recipe of Osawa et al. (arXiv 1811.12019, 2002.06015), on any number of ranks.

torchrun --nproc-per-node 8 -m examples.imagenet.train DATA --recipe 4096

DATA holds train/ and val/ with one folder of pictures for each class. README.md beside this file says what is known
about it and what is not.
"""

import argparse
import contextlib
import csv
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import triton_curv as tc
from examples.imagenet.data import loaders
from profiles.models import resnet50
from triton_curv.errors import ConfigurationError, TritonCurvError
from triton_curv.recipes import Osawa2019, osawa2019

WIRES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
Batches = DataLoader[tuple[Tensor, Tensor]]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", type=int, default=4096, help="batch size whose row of the paper's table is used")
    parser.add_argument("--stale", choices=("none", "epoch", "adaptive"), default="adaptive")
    parser.add_argument("--batch-size", type=int, help="images a step over all ranks; default: the recipe's")
    parser.add_argument("--micro-batch", type=int, default=64, help="images a rank takes through the model at once")
    parser.add_argument("--epochs", type=int, help="default: where the recipe's decay ends, rounded up")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer; 64 is ResNet-50")
    parser.add_argument("--depths", default="3,4,6,3", help="blocks of each stage; 3,4,6,3 is ResNet-50")
    parser.add_argument(
        "--wire", choices=tuple(WIRES), default="float32", help="of factors and gradients between ranks"
    )
    parser.add_argument("--bf16", action="store_true", help="autocast the model to bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=8, help="processes that read pictures, for each rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet"))
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    return parser.parse_args()


class Run:
    """One rank's share of the training."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else 0)
        if not torch.cuda.is_available():
            self.device = torch.device("cpu")
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.train_batches, self.val_batches, self.classes = loaders(
            given.data, given.image, given.micro_batch, given.workers, given.seed
        )
        batch = given.recipe if given.batch_size is None else given.batch_size
        self.passes, rest = divmod(batch, given.micro_batch * self.ranks)
        if rest or not self.passes:
            raise ConfigurationError(
                f"expected a batch that {self.ranks} ranks take in micro-batches of {given.micro_batch}, got {batch}"
            )
        self.recipe = self._recipe(batch)
        torch.manual_seed(given.seed)
        model: nn.Module = resnet50(self.classes, [int(d) for d in given.depths.split(",")], given.width)
        model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stub
        ids = [self.device.index] if self.device.type == "cuda" else None
        self.bare = model
        self.wrapped = DistributedDataParallel(model, ids) if self.ranks > 1 else model
        sharding = tc.Sharding(wire=WIRES[given.wire])
        self.optimizer = self.recipe.optimizer(self.wrapped, sharding=sharding)
        self.schedule = self.recipe.schedule(self.optimizer)
        self.model = torch.compile(self.wrapped) if given.compile else self.wrapped
        self.mixup, self.erasing = self.recipe.mixup(), self.recipe.erasing()
        self.step = 0

    def _recipe(self, batch: int) -> Osawa2019:
        """The paper's settings for the recipe's batch size, with epochs of the data at hand."""
        found = osawa2019(self.given.recipe, stale=self.given.stale)
        images = len(self.train_batches) * self.given.micro_batch * self.ranks
        return dataclasses.replace(found, steps_per_epoch=max(1, images // batch))

    @property
    def epochs(self) -> int:
        """Epochs in all."""
        return int(-(-self.recipe.table.end // 1)) if self.given.epochs is None else int(self.given.epochs)

    def train_epoch(self, epoch: int) -> float:
        """One pass over the images; the mean training loss of this rank."""
        self.wrapped.train()
        sampler = self.train_batches.sampler
        assert isinstance(sampler, DistributedSampler)
        sampler.set_epoch(epoch)
        batches, losses = iter(self.train_batches), []
        for _ in range(self.recipe.steps_per_epoch):
            if self.finished:
                break
            losses.append(self.train_step(list(itertools.islice(batches, self.passes))))
            self.step += 1
        return float(torch.stack(losses).mean()) if losses else float("nan")

    @property
    def finished(self) -> bool:
        """Whether the number of steps asked for is reached."""
        return self.given.steps is not None and self.step >= self.given.steps

    def train_step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One step on the mean loss of the micro-batches; gradients are exchanged in the last one's backward pass."""
        total = torch.zeros((), device=self.device)
        for i, (images, labels) in enumerate(micro_batches):
            images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            targets = functional.one_hot(labels, self.classes).to(self.device, torch.float32)
            images, targets = self.mixup(images, targets)
            images = self.erasing(images)
            with self._exchange_if(i + 1 == len(micro_batches)):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.given.bf16):
                    loss = functional.cross_entropy(self.model(images), targets) / len(micro_batches)
                loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return total

    @contextlib.contextmanager
    def _exchange_if(self, last: bool) -> Iterator[None]:
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            yield
        else:
            with self.wrapped.no_sync():
                yield

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of validation images of all ranks whose class is the model's first guess."""
        self.wrapped.eval()
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        for images, labels in self.val_batches:
            images = images.to(self.device, memory_format=torch.channels_last)
            guesses = self.model(images).argmax(1)
            counts += torch.tensor([float((guesses.cpu() == labels).sum()), float(len(labels))], device=self.device)
        dist.all_reduce(counts)
        return float(counts[0] / counts[1])

    def save(self, epoch: int) -> None:
        """Everything that a resumed run needs but the picture that running mixup carries over."""
        state = {
            "epoch": epoch,
            "step": self.step,
            "model": self.bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),  # of all ranks: each has to ask
            "schedule": self.schedule.state_dict(),
        }
        if self.rank == 0:
            path = self.given.out / "checkpoint.pt"
            torch.save(state, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        dist.barrier()

    def load(self) -> int:
        """Continue from the checkpoint; the next epoch."""
        path = self.given.out / "checkpoint.pt"
        if not path.is_file():
            raise ConfigurationError(f"expected a checkpoint to resume at {path}, found none")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        return int(state["epoch"]) + 1

    def go(self) -> None:
        """Train, evaluate and save, epoch by epoch; rank 0 writes OUT/metrics.csv."""
        given, first = self.given, 0
        given.out.mkdir(parents=True, exist_ok=True)
        if given.resume:
            first = self.load()
        if self.rank == 0:
            self.tell()
        for epoch in range(first, self.epochs):
            start = time.perf_counter()
            before = self.step
            loss = self.train_epoch(epoch)
            seconds = time.perf_counter() - start
            accuracy = self.accuracy()
            self.save(epoch)
            images = (self.step - before) * self.passes * given.micro_batch * self.ranks
            if self.rank == 0:
                row = {"epoch": epoch, "step": self.step, "train_loss": loss, "val_top1": accuracy}
                row["images_per_second"] = images / seconds
                print("  ".join(f"{k} {v:.5g}" for k, v in row.items()), flush=True)
                write_row(given.out / "metrics.csv", row, fresh=epoch == 0)
            if self.finished:
                break

    def tell(self) -> None:
        """Say what runs, and which of its numbers are not the paper's."""
        table = self.recipe.table
        print(f"row of the table: {table}; {self.recipe.steps_per_epoch} steps an epoch, {self.epochs} epochs")
        for name, why in self.recipe.ours.items():
            print(f"not from the paper: {name}: {why}")
        if self.given.batch_size not in (None, self.given.recipe):
            print(f"not the recipe: batches of {self.given.batch_size} with the settings for {self.given.recipe}")


def write_row(path: Path, row: dict[str, float], fresh: bool) -> None:
    """Append to a CSV, or begin it."""
    with path.open("w" if fresh else "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main() -> int:
    """Join the process group that torchrun describes (alone without it) and train."""
    given = parsed()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        Run(given).go()
    except TritonCurvError as error:
        print(f"rank {dist.get_rank()}: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
