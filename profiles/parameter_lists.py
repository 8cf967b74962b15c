"""Parameter lists of real networks: the shapes of everything an optimizer steps through."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Shapes = list[tuple[int, ...]]


def small_convnet() -> Shapes:
    """Three conv-BatchNorm layers and a classifier on 8x8 images: many tensors, little work."""
    shapes: Shapes = []
    for c_in, c_out in ((1, 16), (16, 32), (32, 32)):
        shapes += [(c_out, c_in, 3, 3), (c_out,), (c_out,), (c_out,)]
    return [*shapes, (10, 512), (10,)]


def resnet50() -> Shapes:
    """161 tensors, 25.6 million numbers (torchvision's)."""
    shapes: Shapes = []

    def conv(c_in: int, c_out: int, kernel: int) -> None:
        shapes.extend([(c_out, c_in, kernel, kernel), (c_out,), (c_out,)])

    conv(3, 64, 7)
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            conv(channels, width, 1)
            conv(width, width, 3)
            conv(width, 4 * width, 1)
            if block == 0:
                conv(channels, 4 * width, 1)
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def _transformer_blocks(width: int) -> Shapes:
    linears: Shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    one = [shape for linear in linears for shape in (linear, linear[:1])] + [(width,)] * 4
    return one * 12


def gpt2_124m() -> Shapes:
    """148 tensors, 124.4 million numbers; the output layer is the embedding."""
    return [(50257, 768), (1024, 768), *_transformer_blocks(768), (768,), (768,)]


def vit_b16() -> Shapes:
    """152 tensors, 86.6 million numbers (torchvision's)."""
    embedding: Shapes = [(1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768)]
    return [*embedding, *_transformer_blocks(768), (768,), (768,), (1000, 768), (1000,)]


ON_GPU: dict[str, Callable[[], Shapes]] = {"ResNet-50": resnet50, "GPT-2 124M": gpt2_124m, "ViT-B/16": vit_b16}
ON_CPU: dict[str, Callable[[], Shapes]] = {"small convnet": small_convnet, "ResNet-50": resnet50}


def named_shapes(device: torch.device, quick: bool) -> Iterator[tuple[str, Shapes]]:
    """The lists to measure on `device`; the first one only if `quick`."""
    lists = ON_GPU if device.type == "cuda" else ON_CPU
    for name in list(lists)[: 1 if quick else None]:
        yield name, lists[name]()


def random_lists(
    shapes: Shapes, dtypes: Sequence[torch.dtype], device: torch.device, seed: int = 0
) -> list[list[Tensor]]:
    """One list of random tensors of `shapes` for each dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    return [[torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes] for dtype in dtypes]


def largest_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """max |found - exact| / max |exact| over all elements of all tensors."""
    error = max(float((f.double() - e).abs().max()) for f, e in zip(found, exact, strict=True))
    return error / max(float(e.abs().max()) for e in exact)
