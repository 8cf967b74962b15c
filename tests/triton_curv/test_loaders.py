"""Loaders of the papers' data formats, on tiny files of the same format."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from triton_curv.scenarios import DataFormatError, ImageFolder, MissingDataError, load_cifar10
from triton_curv.scenarios.cifar import TEST_FILE, TRAIN_FILES, read_batch
from triton_curv.scenarios.imagenet import CHANNEL_MEAN, CHANNEL_STD


def python2_pickle(content: object) -> bytes:
    """What Python 2 wrote, as CIFAR-10's files are: every string as BINSTRING, NumPy 1's module names."""

    def save_string(pickler: Any, value: bytes | str) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        pickler.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        pickler.memoize(value)

    file = io.BytesIO()
    pickler: Any = pickle._Pickler(file, protocol=2)
    pickler.dispatch = {**pickler.dispatch, bytes: save_string, str: save_string}
    pickler.dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch(rows: int, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (rows, 3072), dtype=np.uint8)
    labels = [int(label) for label in generator.integers(0, 10, rows)]
    return {"data": pixels, "labels": labels, "batch_label": f"batch {seed}", "filenames": ["a.png"] * rows}


def write_cifar(folder: Path) -> list[dict[str, Any]]:
    batches = [batch(3 + seed, seed) for seed in range(6)]
    for name, content in zip((*TRAIN_FILES, TEST_FILE), batches, strict=True):
        (folder / name).write_bytes(python2_pickle(content))
    return batches


def test_cifar10_in_its_python2_format(tmp_path: Path) -> None:
    batches = write_cifar(tmp_path)
    data = load_cifar10(tmp_path)
    pixels = np.concatenate([b["data"] for b in batches[:5]])
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32)).double() / 255
    mean, std = images.mean(dim=(0, 2, 3)), images.std(dim=(0, 2, 3))
    expected = (images - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(data.train_x.double(), expected, atol=1e-5, rtol=0)
    assert data.train_y.tolist() == [label for b in batches[:5] for label in b["labels"]]
    assert data.val_y.tolist() == batches[5]["labels"]
    val = torch.from_numpy(batches[5]["data"].reshape(-1, 3, 32, 32)).double() / 255
    expected = (val - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(data.val_x.double(), expected, atol=1e-5, rtol=0)


def test_cifar10_written_by_python3(tmp_path: Path) -> None:
    content = {key.encode(): value for key, value in batch(4, 0).items()}
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(content, protocol=2))
    images, labels = read_batch(path)
    assert torch.equal(images, torch.from_numpy(content[b"data"].reshape(-1, 3, 32, 32)))
    assert labels.tolist() == content[b"labels"]


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


def test_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    path, target = tmp_path / "batch", tmp_path / "owned"
    path.write_bytes(pickle.dumps({b"data": Hostile(target), b"labels": []}, protocol=2))
    with pytest.raises(DataFormatError, match="mkdir is not part of a CIFAR batch"):
        read_batch(path)
    assert not target.exists()


def pixels(rows: int, columns: int = 3072) -> NDArray[np.uint8]:
    return np.zeros((rows, columns), dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": pixels(2, 3000), b"labels": [1, 2]}, r"uint8 data \(rows, 3072\), got uint8 \(2, 3000\)"),
        ({b"data": pixels(2).astype(np.float32), b"labels": [1, 2]}, "got float32"),
        ({b"data": pixels(2), b"labels": [1]}, "expected 2 integer labels"),
        ({b"data": pixels(2), b"labels": [1, 10]}, "expected labels 0 to 9, got 1 to 10"),
        ({b"data": pixels(2)}, "is not a CIFAR-10 batch"),
        ([1, 2], "is not a CIFAR-10 batch"),
    ],
)
def test_wrong_batch_is_named(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataFormatError, match=message):
        read_batch(path)


def test_truncated_and_missing_batches_are_named(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    path = tmp_path / TRAIN_FILES[2]
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataFormatError, match=r"data_batch_3 is not a CIFAR-10 batch"):
        load_cifar10(tmp_path)
    path.unlink()
    with pytest.raises(DataFormatError, match=r"data_batch_3: No such file"):
        load_cifar10(tmp_path)


def write_image(path: Path, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_image_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "n02" / "b.JPEG", (40, 30), (255, 255, 255))
    write_image(tmp_path / "n01" / "z.png", (30, 50), (255, 0, 51))
    write_image(tmp_path / "n01" / "a.png", (8, 8), (0, 0, 0))
    (tmp_path / "n01" / "notes.txt").write_text("no image")
    folder = ImageFolder(tmp_path, size=14)
    assert folder.classes == ["n01", "n02"]
    assert len(folder) == 3
    image, label = folder[1]
    assert label == 0
    assert image.shape == (3, 14, 14)
    assert image.dtype == torch.float32
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(CHANNEL_MEAN)) / torch.tensor(CHANNEL_STD)
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 14, 14))
    assert folder[2][1] == 1


def test_image_is_cut_to_its_centre(tmp_path: Path) -> None:
    path = tmp_path / "c" / "stripes.png"
    path.parent.mkdir()
    columns = np.zeros((16, 48, 3), dtype=np.uint8)
    columns[:, 16:32] = 255  # only the middle third is white
    Image.fromarray(columns).save(path)
    image, _ = ImageFolder(tmp_path, size=14)[0]
    white = (1 - torch.tensor(CHANNEL_MEAN)) / torch.tensor(CHANNEL_STD)
    torch.testing.assert_close(image, white[:, None, None].expand(3, 14, 14))


def test_grey_image_gets_three_channels(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    Image.new("L", (20, 20), 128).save(tmp_path / "c" / "grey.png")
    assert ImageFolder(tmp_path, size=7)[0][0].shape == (3, 7, 7)


def test_wrong_image_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="folder of class folders"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(DataFormatError, match="expected class folders"):
        ImageFolder(tmp_path)
    (tmp_path / "n01").mkdir()
    with pytest.raises(DataFormatError, match=r"images in .*n01, found none"):
        ImageFolder(tmp_path)
    (tmp_path / "n01" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(DataFormatError, match=r"cannot decode the image .*broken\.png"):
        ImageFolder(tmp_path)[0]
    with pytest.raises(DataFormatError, match="at least 1 pixel, got 0"):
        ImageFolder(tmp_path, size=0)


def test_missing_pillow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDataError, match="pillow"):
        ImageFolder(tmp_path)
