"""A small net with every layer kind that is not a plain stack of modules: attention, embeddings, norms, a tied head."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Transformer(nn.Module):
    """Token and position embeddings, an attention block, a convolution with group norm, a head tied to the embedding.

    `recompute` runs the attention block under activation checkpointing: "reentrant" or "not reentrant".
    """

    def __init__(self, vocabulary: int = 11, width: int = 8, tied: bool = True, recompute: str = "") -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.place = nn.Embedding(16, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.rms = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.group = nn.GroupNorm(2, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def block(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Attention and a two-layer net."""
        y = self.norm(x)
        x = x + self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]
        out: Tensor = x + self.down(self.act(self.up(self.rms(x))))
        return out

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Scores (samples, time, vocabulary)."""
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        if self.recompute and self.training:
            x = checkpoint(self.block, x, padding, use_reentrant=self.recompute == "reentrant")
        else:
            x = self.block(x, padding)
        x = x + self.group(self.mix(x.mT)).mT
        scores: Tensor = self.head(x)
        return scores


def tokens(samples: int = 5, time: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and targets, (samples, time); token 0 is padding and occurs."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 11, (samples, time), generator=generator),
        torch.randint(1, 11, (samples, time), generator=generator),
    )
