"""ImageNet for training: a random crop and a random mirror image of each picture, shared out over ranks."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from triton_curv.errors import ConfigurationError
from triton_curv.scenarios import DataFormatError, ImageFolder
from triton_curv.scenarios.imagenet import CHANNEL_MEAN, CHANNEL_STD

AREA, ASPECT, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Of the random crop: share of the picture, width over height, attempts before the centre is taken (Inception's)."""


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """The pictures of an `ImageFolder`, cropped and mirrored at random; torch's random numbers."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        """Number of images."""
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image (3, size, size), standardised, and class."""
        from PIL import Image

        path, label = self.folder.images[index]
        size = self.folder.size
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise DataFormatError(f"cannot decode the image {path}: {error}") from error
        box = random_box(picture.width, picture.height)
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        if float(torch.rand(())) < 0.5:
            pixels = pixels.flip(-1)
        mean, std = torch.tensor(CHANNEL_MEAN).view(3, 1, 1), torch.tensor(CHANNEL_STD).view(3, 1, 1)
        return (pixels - mean) / std, label


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part of a picture; its central square where none fits."""
    low, high = (math.log(limit) for limit in ASPECT)
    for _ in range(TRIES):
        share, log_aspect = torch.rand(2).tolist()
        area = width * height * (AREA[0] + share * (AREA[1] - AREA[0]))
        aspect = math.exp(low + log_aspect * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, ()))
            top = int(torch.randint(height - h + 1, ()))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def loaders(
    root: Path, size: int, micro_batch: int, workers: int, seed: int
) -> tuple[DataLoader[tuple[Tensor, Tensor]], DataLoader[tuple[Tensor, Tensor]], int]:
    """Training and validation batches of this rank from `root`/train and `root`/val, and the number of classes.

    Raises:
        DataFormatError: no such folders, or pictures that can't be read.
        ConfigurationError: other classes in train than in val, or fewer pictures than ranks need.

    """
    train, val = ImageFolder(root / "train", size), ImageFolder(root / "val", size)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ConfigurationError(f"expected the same classes in {root}/train and {root}/val, got a difference: {odd}")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if len(train) < micro_batch * ranks:
        raise ConfigurationError(
            f"expected at least {micro_batch} training images for each of {ranks} ranks, got {len(train)}"
        )
    sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(
        TrainingImages(train), ranks, rank, seed=seed, drop_last=True
    )
    common = {"num_workers": workers, "pin_memory": torch.cuda.is_available(), "persistent_workers": workers > 0}
    batches = DataLoader(TrainingImages(train), micro_batch, sampler=sampler, drop_last=True, **common)  # type: ignore[arg-type]  # as DataLoader collates them
    mine = torch.utils.data.Subset(val, range(rank, len(val), ranks))
    return batches, DataLoader(mine, micro_batch, **common), len(train.classes)  # type: ignore[arg-type, return-value]  # as DataLoader collates them
