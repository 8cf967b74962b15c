"""Models of real size that benchmarks measure: ResNet-50, GPT-2 124M, ViT-B/16, written out in plain torch."""

from profiles.models.resnet import resnet50
from profiles.models.transformer import gpt2, vit_b16

__all__ = ["gpt2", "resnet50", "vit_b16"]
