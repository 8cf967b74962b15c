"""The ImageNet example, dry: two ranks, 20 tiny JPEGs, a narrow ResNet; one rank continues from their checkpoint."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.imagenet.data import TrainingImages, random_box
from triton_curv.scenarios import ImageFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 4 validation pictures of two classes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for label in ("cat", "dog"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40 + i, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    return root


def run(pictures: Path, out: Path, *options: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "autotune")))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    small = ["--image", "32", "--width", "4", "--depths", "1,1,1,1", "--micro-batch", "2", "--workers", "0"]
    program = ["-m", "examples.imagenet.train", str(pictures), "--out", str(out), *small, *options]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, *program]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_two_ranks_train_and_save_and_one_continues(pictures: Path, tmp_path: Path) -> None:
    done = run(pictures, tmp_path, "--batch-size", "8", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "not the recipe: batches of 8 with the settings for 4096" in done.stdout
    assert "not from the paper: weight_decay" in done.stdout
    done = run(pictures, tmp_path, "--batch-size", "8", "--epochs", "2", "--resume", "--steps", "3", ranks=1)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "metrics.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["epoch"], first["step"], second["epoch"], second["step"]) == ("0", "2", "1", "3")
    assert all(0 < float(row["train_loss"]) < 10 and 0 <= float(row["val_top1"]) <= 1 for row in (first, second))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 3
    assert saved["optimizer"]["param_groups"][0]["step"] == 3


def test_what_does_not_fit_is_one_line(pictures: Path, tmp_path: Path) -> None:
    done = run(pictures, tmp_path, "--batch-size", "3", ranks=1)
    assert done.returncode == 2
    assert "expected a batch that 1 ranks take in micro-batches of 2, got 3" in done.stderr


def test_crops_lie_inside_and_pictures_differ_from_time_to_time(pictures: Path) -> None:
    torch.manual_seed(0)
    for width, height in ((36, 40), (400, 3), (1, 1)):
        for _ in range(50):
            left, top, right, bottom = random_box(width, height)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
    images = TrainingImages(ImageFolder(pictures / "train", 32))
    (first, label), (second, _) = images[3], images[3]
    assert first.shape == (3, 32, 32)
    assert label == 0
    assert not torch.equal(first, second)
