"""CIFAR-10 in the format of cs.toronto.edu/~kriz/cifar.html: pickled batches in one folder."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from triton_curv.scenarios.errors import DataFormatError
from triton_curv.scenarios.scenario import Data

TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILE = "test_batch"


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """What ``_codecs.encode`` does in a pickle of bytes, and nothing else it could do."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"expected latin1 text, got encoding {encoding!r}")
    return text.encode("latin1")


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1_bytes,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds dicts, lists, bytes, numbers and NumPy arrays; a pickle that names anything else fails."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a CIFAR batch") from None


def read_batch(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (rows, 3, 32, 32) uint8 and classes (rows,) int64 of one batch file.

    Unpickles nothing but dicts, bytes, numbers and arrays, so a hostile file cannot run code.

    Raises:
        DataFormatError: Where the file is missing or not a CIFAR-10 batch.

    """
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file).load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except OSError as error:
        raise DataFormatError(f"expected a CIFAR-10 batch at {path}: {error.strerror}") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
    ) as error:
        raise DataFormatError(f"{path} is not a CIFAR-10 batch: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise DataFormatError(f"{path}: expected uint8 data (rows, 3072), got {pixels.dtype} {pixels.shape}")
    if labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataFormatError(f"{path}: expected {pixels.shape[0]} integer labels, got {labels.dtype} {labels.shape}")
    if labels.size and not (labels.min() >= 0 and labels.max() <= 9):
        raise DataFormatError(f"{path}: expected labels 0 to 9, got {labels.min()} to {labels.max()}")
    return torch.from_numpy(pixels.copy()).reshape(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64))


def load_cifar10(folder: str | Path) -> Data:
    """CIFAR-10 from ``folder`` (``cifar-10-batches-py``), each channel standardised by the training images.

    ``data_batch_1`` to ``data_batch_5`` train, ``test_batch`` validates. Images: float32 (rows, 3, 32, 32).

    Raises:
        DataFormatError: Where a file is missing or not a CIFAR-10 batch.

    """
    batches = [read_batch(Path(folder) / name) for name in TRAIN_FILES]
    train_x = torch.cat([images for images, _ in batches]).float() / 255
    val_images, val_y = read_batch(Path(folder) / TEST_FILE)
    mean, std = train_x.mean(dim=(0, 2, 3), keepdim=True), train_x.std(dim=(0, 2, 3), keepdim=True)
    return Data(
        (train_x - mean) / std,
        torch.cat([labels for _, labels in batches]),
        (val_images.float() / 255 - mean) / std,
        val_y,
    )
