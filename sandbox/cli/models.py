"""The demo's models: small, with random weights from a seed; nothing is downloaded.

Each is real in what it asks of a compiler: attention and rotary embeddings, convolution and batch norm, random
numbers, control flow, graph breaks. All return one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

#: Words in the vocabulary of the language models, a count; small, so that weights are.
VOCABULARY: Final = 256
#: Tokens of an input, a count.
TOKENS: Final = 32


@dataclass(frozen=True)
class Model:
    """One model of the demo. ``build`` gives it and the inputs to run it on, in the order in which they are run."""

    name: str
    build: Callable[[], tuple[nn.Module, list[tuple[Any, ...]]]]
    random: bool = False
    """Draws random numbers while training: also compared with the in-process compile under equal seeds."""
    trains: bool = True
    extra: bool = False
    """Only with `--all`."""
    rtol: float = 1e-4
    atol: float = 1e-5


class _Logits(nn.Module):  # type: ignore[misc]
    """A transformers model, reduced to its first output."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(tokens, return_dict=True, **self.options)[0]
        return result


class Conv(nn.Module):  # type: ignore[misc]
    """Convolution, batch norm, ReLU, pooling, twice; then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        )  # fmt: skip
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.features(images).flatten(1))
        return result


class Dropout(nn.Module):  # type: ignore[misc]
    """Two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 64), nn.Dropout(0.1), nn.Linear(64, 8)
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(rows)
        return result


class Cond(nn.Module):  # type: ignore[misc]
    """Control flow in the graph: the sum of the input decides which layer is used."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Linear(32, 32)
        self.negative = nn.Linear(32, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        def when_positive(rows: torch.Tensor) -> torch.Tensor:
            return self.positive(rows).relu()

        def when_negative(rows: torch.Tensor) -> torch.Tensor:
            return self.negative(rows).sigmoid()

        chosen = torch.cond(rows.sum() > 0, when_positive, when_negative, (rows,))
        result: torch.Tensor = self.head(chosen)
        return result


def _tokens(length: int = TOKENS, batch: int = 2) -> list[tuple[Any, ...]]:
    return [(torch.randint(0, VOCABULARY, (batch, length)),)]


def _llama() -> tuple[nn.Module, list[tuple[Any, ...]]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    return _Logits(LlamaForCausalLM(config), use_cache=False), _tokens()


def _gpt2() -> tuple[nn.Module, list[tuple[Any, ...]]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=128, n_layer=2, n_head=4, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _Logits(GPT2LMHeadModel(config), use_cache=False), _tokens()


def _conv() -> tuple[nn.Module, list[tuple[Any, ...]]]:
    return Conv(), [(torch.randn(4, 3, 32, 32),)]


def _dropout() -> tuple[nn.Module, list[tuple[Any, ...]]]:
    return Dropout(), [(torch.randn(16, 32),)]


def _cond() -> tuple[nn.Module, list[tuple[Any, ...]]]:
    rows = torch.rand(16, 32) + 0.1
    return Cond(), [(rows,), (-rows,)]


def _bigbird() -> tuple[nn.Module, list[tuple[Any, ...]]]:
    from transformers import BigBirdConfig, BigBirdModel

    # Block-sparse attention needs more than (5 + 2 * num_random_blocks) * block_size tokens; else it becomes full.
    config = BigBirdConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=256, block_size=8, num_random_blocks=1, use_cache=False, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _Logits(BigBirdModel(config)), _tokens(96, 1)


def _reformer() -> tuple[nn.Module, list[tuple[Any, ...]]]:
    from transformers import ReformerConfig, ReformerModel

    config = ReformerConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=2, attention_head_size=32, feed_forward_size=128,
        attn_layers=["local", "lsh"], axial_pos_shape=[8, 8], axial_pos_embds_dim=[32, 32], num_buckets=4, hash_seed=0,
        lsh_attn_chunk_length=16, local_attn_chunk_length=16, max_position_embeddings=64, is_decoder=False,
        hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _Logits(ReformerModel(config)), _tokens(64, 1)


MODELS: Final = (
    Model("llama", _llama),
    Model("gpt2", _gpt2),
    Model("conv", _conv),
    Model("dropout", _dropout, random=True),
    Model("cond", _cond),
    Model("bigbird", _bigbird, extra=True),
    Model("reformer", _reformer, extra=True),
)

#: The demo's Triton kernel: a fused softmax over rows.
TRITON_SOURCE: Final = """
import triton
import triton.language as tl


@triton.jit
def softmax_rows(out, rows, stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    values = tl.load(rows + row * stride + offsets, mask=mask, other=-float("inf"))
    raised = tl.exp(values - tl.max(values, axis=0))
    tl.store(out + row * stride + offsets, raised / tl.sum(raised, axis=0), mask=mask)
"""
TRITON_FUNCTION: Final = "softmax_rows"
TRITON_SIGNATURE: Final = {"out": "*fp32", "rows": "*fp32", "stride": "i32", "columns": "i32"}
TRITON_CONSTANTS: Final = {"BLOCK": 256}
TRITON_TARGET: Final = "cuda:90"
