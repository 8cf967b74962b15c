"""ImageNet as a folder of class folders (``train/n01440764/*.JPEG``), read one image at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from triton_curv.scenarios.errors import DataFormatError, MissingDataError

IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png"})
CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """``folder/<class>/<image>`` as a map-style data set of (image (3, size, size) float32, class index).

    Classes are the sub-folders in alphabetical order, images the JPEG and PNG files in them. An image is
    scaled so that its shorter side is ``size * 8 / 7`` (256 for 224), cut to the centre, and standardised by
    ImageNet's channel means and deviations.

    Args:
        folder: ``train`` or ``val`` of ImageNet, or any folder of the same form.
        size: Side of the square image, in pixels.

    Raises:
        MissingDataError: Where Pillow is not installed.
        DataFormatError: Where the folder is missing, has no class folders, or a class has no images; when an
            image is read, where the file cannot be decoded.

    """

    def __init__(self, folder: str | Path, size: int = 224) -> None:
        try:
            import PIL.Image  # noqa: F401 - fail here, not at the first image
        except ImportError as error:
            raise MissingDataError("pillow", "reading an image folder") from error
        root = Path(folder)
        if not root.is_dir():
            raise DataFormatError(f"expected a folder of class folders at {root}, found none")
        if size < 1:
            raise DataFormatError(f"expected an image size of at least 1 pixel, got {size}")
        self.size = size
        self.classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if not self.classes:
            raise DataFormatError(f"expected class folders in {root}, found none")
        self.images: list[tuple[Path, int]] = []
        for index, name in enumerate(self.classes):
            files = sorted(f for f in (root / name).iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise DataFormatError(f"expected JPEG or PNG images in {root / name}, found none")
            self.images.extend((file, index) for file in files)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image and class of row ``index``."""
        path, label = self.images[index]
        return decode_image(path, self.size), label


def decode_image(path: Path, size: int) -> Tensor:
    """The centre of the image at ``path`` as a standardised (3, size, size) float32 tensor.

    Raises:
        DataFormatError: Where the file cannot be decoded.

    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError on a broken chunk
        raise DataFormatError(f"cannot decode the image {path}: {error}") from error
    scale = size * 8 / 7 / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor(CHANNEL_MEAN).reshape(3, 1, 1), torch.tensor(CHANNEL_STD).reshape(3, 1, 1)
    return (pixels - mean) / std
