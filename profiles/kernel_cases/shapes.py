"""Real layers, as plain numbers: the shapes that kernel benchmarks are named after.

Convolutions come as `ConvShape`, Kronecker factors as `FactorShape`: A of a layer from its inputs (patches for a
convolution, one column of ones for a bias), G from the gradients of its outputs, both with one row for each sample
and position.
"""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple


class ConvShape(NamedTuple):
    """A Conv2d and its input (batch, in_channels, height, width); square kernel, padding k // 2 as in ResNets."""

    name: str
    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel_size: int
    stride: int
    padding: int

    @property
    def positions(self) -> int:
        """Output positions over the batch: rows of its factors."""
        height, width = (
            (size + 2 * self.padding - self.kernel_size) // self.stride + 1 for size in (self.height, self.width)
        )
        return self.batch * height * width

    @property
    def patch(self) -> int:
        """Numbers a patch holds: columns of its A."""
        return self.in_channels * self.kernel_size**2


class LinearShape(NamedTuple):
    """A Linear and the rows (samples or tokens) of its input."""

    name: str
    rows: int
    in_features: int
    out_features: int
    bias: bool


class FactorShape(NamedTuple):
    """C += X^T X with X (k, n), and n + 1 columns, the last of ones, if `ones`."""

    name: str
    k: int
    n: int
    ones: bool


def conv_factors(conv: ConvShape) -> list[FactorShape]:
    """A and G of a convolution without a bias."""
    return [
        FactorShape(f"{conv.name}.A", conv.positions, conv.patch, False),
        FactorShape(f"{conv.name}.G", conv.positions, conv.out_channels, False),
    ]


def linear_factors(linear: LinearShape) -> list[FactorShape]:
    """A and G of a linear layer."""
    return [
        FactorShape(f"{linear.name}.A", linear.rows, linear.in_features, linear.bias),
        FactorShape(f"{linear.name}.G", linear.rows, linear.out_features, False),
    ]


def resnet50_convs(batch: int, image: int = 224) -> list[ConvShape]:
    """The 53 convolutions of torchvision's ResNet-50, in forward order (stride in the 3x3 convolution)."""
    convs: list[ConvShape] = []

    def add(name: str, channels: int, size: int, out: int, kernel: int, stride: int) -> int:
        convs.append(ConvShape(name, batch, channels, size, size, out, kernel, stride, kernel // 2))
        return (size + 2 * (kernel // 2) - kernel) // stride + 1

    size = add("conv1", 3, image, 64, 7, 2)
    size = (size + 2 - 3) // 2 + 1  # max pooling
    channels = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            add(f"{name}.conv1", channels, size, width, 1, 1)
            after = add(f"{name}.conv2", width, size, width, 3, stride)
            add(f"{name}.conv3", width, after, 4 * width, 1, 1)
            if block == 0:
                add(f"{name}.downsample", channels, size, 4 * width, 1, stride)
            channels, size = 4 * width, after
    return convs


def resnet50_linears(batch: int) -> list[LinearShape]:
    """The classifier of ResNet-50."""
    return [LinearShape("fc", batch, 2048, 1000, True)]


def resnet50_factors(batch: int, image: int = 224) -> list[FactorShape]:
    """All 108 factors of ResNet-50."""
    convs = chain.from_iterable(map(conv_factors, resnet50_convs(batch, image)))
    return [*convs, *_factors(resnet50_linears(batch))]


def gpt2_linears(batch: int = 8, tokens: int = 1024) -> list[LinearShape]:
    """The 48 linear layers of GPT-2 124M; its output layer is the embedding, which has a diagonal A."""
    rows, width = batch * tokens, 768
    return [
        LinearShape(f"h.{block}.{name}", rows, n_in, n_out, True)
        for block in range(12)
        for name, n_in, n_out in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        )
    ]


def gpt2_factors(batch: int = 8, tokens: int = 1024) -> list[FactorShape]:
    """All 96 factors of GPT-2 124M but those of the embeddings."""
    return _factors(gpt2_linears(batch, tokens))


def vit_b16_linears(batch: int = 64, image: int = 224) -> list[LinearShape]:
    """ViT-B/16: the patch embedding (a linear layer of 16 x 16 x 3 inputs), 12 blocks of 4, the head."""
    patches, width = (image // 16) ** 2, 768
    rows = batch * (patches + 1)  # and the class token
    blocks = [
        LinearShape(f"blocks.{block}.{name}", rows, n_in, n_out, True)
        for block in range(12)
        for name, n_in, n_out in (
            ("attn.qkv", width, 3 * width),
            ("attn.proj", width, width),
            ("mlp.fc1", width, 4 * width),
            ("mlp.fc2", 4 * width, width),
        )
    ]
    embedding = LinearShape("patch_embed", batch * patches, 16 * 16 * 3, width, True)
    return [embedding, *blocks, LinearShape("head", batch, width, 1000, True)]


def vit_b16_factors(batch: int = 64, image: int = 224) -> list[FactorShape]:
    """All 100 factors of ViT-B/16."""
    return _factors(vit_b16_linears(batch, image))


def llama7b_layer_linears(batch: int = 4, tokens: int = 2048) -> list[LinearShape]:
    """One of the 32 blocks of LLaMA-7B: 7 linear layers without a bias."""
    rows, width, hidden = batch * tokens, 4096, 11008
    return [LinearShape(f"self_attn.{name}_proj", rows, width, width, False) for name in ("q", "k", "v", "o")] + [
        LinearShape("mlp.gate_proj", rows, width, hidden, False),
        LinearShape("mlp.up_proj", rows, width, hidden, False),
        LinearShape("mlp.down_proj", rows, hidden, width, False),
    ]


def llama7b_layer_factors(batch: int = 4, tokens: int = 2048) -> list[FactorShape]:
    """The 14 factors of a LLaMA-7B block."""
    return _factors(llama7b_layer_linears(batch, tokens))


def _factors(linears: Iterable[LinearShape]) -> list[FactorShape]:
    return list(chain.from_iterable(map(linear_factors, linears)))
