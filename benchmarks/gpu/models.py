"""The five models of the GPU benchmarks: full size (BigBird: two layers) but where asked for less, fp32, random
weights, no download, no dropout: eager and compiled code draw different random numbers, and results are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import nn

from benchmarks.corpus.models import LennardJones

#: Classes of the models that classify.
CLASSES: Final = 10


class _MixerBlock(nn.Module):  # type: ignore[misc]
    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(patches, width // 2), nn.GELU(), nn.Linear(width // 2, patches))
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows + self.mix(self.first(rows).transpose(1, 2)).transpose(1, 2)
        result: torch.Tensor = rows + self.feed(self.second(rows))
        return result


class Mixer(nn.Module):  # type: ignore[misc]
    """MLP-Mixer, B/16 with twelve layers (Tolstikhin et al., 2021, table 1)."""

    def __init__(self, layers: int, width: int = 768, side: int = 224, patch: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(_MixerBlock((side // patch) ** 2, width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.blocks(self.stem(images).flatten(2).transpose(1, 2))
        result: torch.Tensor = self.head(self.norm(rows).mean(dim=1))
        return result


class _Output(nn.Module):  # type: ignore[misc]
    """A transformers model, reduced to its first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(inputs)[0]
        return result


def _gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return _Output(GPT2LMHeadModel(GPT2Config(n_layer=layers, use_cache=False, **off)))


def _vit(layers: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return _Output(ViTForImageClassification(ViTConfig(num_hidden_layers=layers, num_labels=CLASSES, **off)))


def _bigbird(layers: int) -> nn.Module:
    from transformers import BigBirdConfig, BigBirdModel

    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return _Output(BigBirdModel(BigBirdConfig(num_hidden_layers=layers, use_cache=False, **off)))


def _tokens(length: int, words: int = 50257) -> torch.Tensor:
    return torch.randint(0, words, (2, length))


@dataclasses.dataclass(frozen=True)
class _Model:
    build: Callable[[int], nn.Module]
    inputs: Callable[[], torch.Tensor]


_MODELS: Final = {
    "lennard-jones": _Model(lambda layers: LennardJones(), lambda: 1 + torch.rand(1000)),
    "gpt2": _Model(_gpt2, lambda: _tokens(256)),
    "vit-b16": _Model(_vit, lambda: torch.randn(4, 3, 224, 224)),
    "mixer-b16": _Model(Mixer, lambda: torch.randn(4, 3, 224, 224)),
    # Block-sparse attention; shorter inputs get full attention.
    # Two layers, each of which is more than twenty graphs.
    "bigbird": _Model(lambda layers: _bigbird(min(layers, 2)), lambda: _tokens(1024, 50358)),
}
NAMES: Final = tuple(_MODELS)


def build(names: list[str], layers: int, device: str) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Name, module and input of each, on ``device``."""
    for name in names:
        torch.manual_seed(0)
        model = _MODELS[name]
        yield name, model.build(layers).to(device), model.inputs().to(device)


def step(module: Any, inputs: torch.Tensor, train: bool) -> list[torch.Tensor]:
    """The outputs of an inference, or outputs and gradients of a training step."""
    module.train(train)
    with torch.set_grad_enabled(train):
        found = module(inputs)
    outputs = [one.detach().clone() for one in torch.utils._pytree.tree_leaves(found)]
    if train:
        module.zero_grad()
        sum(one.float().square().mean() for one in torch.utils._pytree.tree_leaves(found)).backward()
        outputs += [one.grad.detach().clone() for one in module.parameters() if one.grad is not None]
    return outputs


def difference(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest one, relative to the largest value of its tensor."""
    pairs = zip(got, want, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)
