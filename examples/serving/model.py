"""The model that is served: a small classifier of texts, byte by byte. Its weights are random, but always the same."""

from __future__ import annotations

import torch
from torch import nn

#: Longest text, in bytes. Every length is a shape of its own.
MAX_LENGTH = 256
CLASSES = 10


class Classifier(nn.Module):
    """Bytes to probabilities of ten classes."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(MAX_LENGTH, width)
        self.mix = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.classes = nn.Linear(width, CLASSES)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """``text``: int64 of shape (1, length)."""
        x = self.bytes(text) + self.places(torch.arange(text.shape[1]))
        return torch.softmax(self.classes(x + self.mix(x)).mean(1), -1)


def build() -> Classifier:
    """The model, ready to serve."""
    torch.manual_seed(20_261_125)
    return Classifier().eval()


def as_tensor(text: bytes) -> torch.Tensor:
    """A text as the model takes it."""
    return torch.tensor([list(text)])
