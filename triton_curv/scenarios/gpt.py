"""tiny-gpt: a character-level transformer on the names of Unicode's characters, cross-entropy per character."""

from __future__ import annotations

import math
import sys
import unicodedata
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from triton_curv.scenarios.scenario import Data, Scenario, loss_metric

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2
BLOCK_ROWS = 25
"""Neighbouring rows that go together: every twentieth block validates."""


@cache
def unicode_names() -> str:
    """Names of the 12,771 characters of Unicode 3.2 that are not numbered ideographs or syllables, a line each.

    352,132 characters of 39 kinds. Every Python carries this version of the database unchanged, and Unicode never
    changes a name, so that the text is the same on all machines.
    """
    database = unicodedata.ucd_3_2_0
    names = (database.name(chr(code), "") for code in range(sys.maxunicode + 1))
    return "".join(f"{name}\n" for name in names if name and not name.startswith(("CJK", "HANGUL SYLLABLE")))


def load_unicode_names() -> Data:
    """Rows of 64 characters and, as targets, those one further on; int64 (rows, 64): 5,227 and 275 rows."""
    text = unicode_names()
    vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([vocabulary[character] for character in text])
    rows = (len(tokens) - 1) // CONTEXT
    x = tokens[: rows * CONTEXT].reshape(rows, CONTEXT)
    y = tokens[1 : rows * CONTEXT + 1].reshape(rows, CONTEXT)
    val = torch.arange(rows) // BLOCK_ROWS % 20 == 19
    return Data(x[~val], y[~val], x[val], y[val])


class Block(nn.Module):
    """x + attention(LN(x)), then x + mlp(LN(x)); causal attention, a GELU layer four times as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> the same."""
        heads = self.qkv(self.ln1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x))))  # type: ignore[no-any-return]  # torch's modules return Any


class TinyGPT(nn.Module):
    """Tokens (N, T) -> logits of the next (N, T, vocabulary); two blocks, learned positions, an untied head."""

    def __init__(self, vocabulary: int = 39) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T) int64 -> (N, T, vocabulary)."""
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(h)))  # type: ignore[no-any-return]  # torch's modules return Any


def character_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`F.cross_entropy` over all positions of all rows."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


TINY_GPT = Scenario(
    name="tiny-gpt",
    summary="names of Unicode's characters (Python), transformer of 2 blocks, width 64, context 64, cross-entropy",
    train_rows=5227,
    load=load_unicode_names,
    model=TinyGPT,
    loss=character_cross_entropy,
    metric=loss_metric("bits per character", character_cross_entropy, 1 / math.log(2)),
    batch_size=32,
    budget=200,
    evaluate_every=10,
    loss_rows=256,
    target_loss=2.175,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates={
        "sgd": 1e-1,
        "adamw": 3e-3,
        "neumann": 1e-1,
        "kfac": 3e-2,
        "newton-cg": 1e-1,
        "neumann-inner": 3e-2,
    },
)
