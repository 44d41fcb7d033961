"""Whole models: small, with random weights from a seed; nothing is downloaded.

Each for inference and for a training step, with fixed shapes and with dynamic ones (two sizes, one after the other).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch._dynamo
from torch import nn

from benchmarks.corpus.entry import Call, Case, Entry, Skip

#: Words in the vocabulary of the language models, a count; small, so that weights are.
WORDS: Final = 128


def _preload() -> tuple[str, ...]:
    try:
        found = importlib.util.find_spec("transformers.integrations.moe")
    except ImportError:
        found = None
    return ("transformers.integrations.moe",) if found is not None else ()


#: It registers an operator of the mixture of experts.
PRELOAD: Final = _preload()


@dataclass(frozen=True)
class _Model:
    """``build`` gives the module, ``inputs`` the keyword arguments for a size: 0 the usual one, 1 a larger one."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    mark: tuple[str, int] | None = None
    """Argument and dimension that is marked as dynamic; None means `dynamic=True`."""
    firmly: bool = True
    """Whether it is an error if the model fixes that dimension all the same."""
    grows: bool = True
    """Whether there is a second size."""


def entries() -> Iterator[Entry]:
    """All of them."""
    for model in _MODELS:
        for training in (False, True):
            for dynamic in (False, True):
                yield Entry(
                    name=f"model/{model.name}/{'training' if training else 'inference'}{'-dynamic' * dynamic}",
                    make=functools.partial(_case, model, training, dynamic),
                    training=training,
                    dynamic=(None if model.mark else True) if dynamic else False,
                    seconds=600.0,
                )


def _case(model: _Model, training: bool, dynamic: bool) -> Case:
    torch.manual_seed(0)
    try:
        module = model.build().train(training)
    except ImportError as error:
        raise Skip(str(error)) from None
    calls = [model.inputs(size) for size in ((0, 1) if dynamic and model.grows else (0,))]
    if dynamic and model.mark is not None:
        mark = torch._dynamo.mark_dynamic if model.firmly else torch._dynamo.maybe_mark_dynamic
        for kwargs in calls:
            mark(kwargs[model.mark[0]], model.mark[1])
    return Case(module, [Call((), kwargs) for kwargs in calls])


class _First(nn.Module):  # type: ignore[misc]
    """A transformers model, reduced to its first output: the others are caches and intermediate states."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, **inputs: Any) -> torch.Tensor:
        result: torch.Tensor = self.model(**inputs, **self.options, return_dict=True)[0]
        return result


class LennardJones(nn.Module):  # type: ignore[misc]
    """Energy of pairs of atoms, and the forces, which are its gradient, by `torch.func`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def energy(self, distance: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(distance.reshape(1, 1)).squeeze()
        return result

    def forward(self, distance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        force, energy = torch.vmap(torch.func.grad_and_value(self.energy))(distance)
        return energy, -force


class _MixerBlock(nn.Module):  # type: ignore[misc]
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows + self.mix(self.first(rows).transpose(1, 2)).transpose(1, 2)
        result: torch.Tensor = rows + self.feed(self.second(rows))
        return result


class Mixer(nn.Module):  # type: ignore[misc]
    """MLP-Mixer: patches, two blocks, an average, a head."""

    def __init__(self, width: int = 32, patches: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, stride=8)
        self.blocks = nn.Sequential(_MixerBlock(patches, width), _MixerBlock(patches, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.stem(images).flatten(2).transpose(1, 2)
        result: torch.Tensor = self.head(self.norm(self.blocks(rows)).mean(dim=1))
        return result


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return _First(LlamaForCausalLM(config), use_cache=False)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_positions=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return _First(GPT2LMHeadModel(config), use_cache=False)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    return _First(BertForMaskedLM(config))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=WORDS, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip
    return _First(T5ForConditionalGeneration(config), use_cache=False)


def _bigbird() -> nn.Module:
    from transformers import BigBirdConfig, BigBirdModel

    # Block-sparse attention needs more than (5 + 2 * num_random_blocks) * block_size tokens; else it becomes full.
    config = BigBirdConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, block_size=8, num_random_blocks=1, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    return _First(BigBirdModel(config))


def _reformer() -> nn.Module:
    from transformers import ReformerConfig, ReformerModel

    config = ReformerConfig(
        vocab_size=WORDS, hidden_size=32, num_attention_heads=2, attention_head_size=16, feed_forward_size=64,
        attn_layers=["local", "lsh"], axial_pos_shape=[8, 8], axial_pos_embds_dim=[16, 16], num_buckets=4, hash_seed=0,
        lsh_attn_chunk_length=16, local_attn_chunk_length=16, max_position_embeddings=64, is_decoder=False,
    )  # fmt: skip
    return _First(ReformerModel(config))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
    )  # fmt: skip
    return _First(ViTForImageClassification(config))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return _First(MixtralForCausalLM(config), use_cache=False)


def _wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16),
        conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    return _First(Wav2Vec2Model(config))


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=WORDS, num_mel_bins=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=32,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return _First(WhisperModel(config), use_cache=False)


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    return _First(ResNetForImageClassification(config))


def _convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=10)
    return _First(ConvNextForImageClassification(config))


def _tokens(size: int, length: int = 16, **more: int) -> dict[str, Any]:
    length += 8 * size
    tokens = {name: torch.randint(3, WORDS, (2, count)) for name, count in more.items()}
    return {"input_ids": torch.randint(3, WORDS, (2, length)), **tokens}


def _long(size: int, length: int) -> dict[str, Any]:
    """Where the length is fixed by the model, the batch grows."""
    return {"input_ids": torch.randint(3, WORDS, (2 + size, length))}


def _images(size: int, side: int = 32, name: str = "pixel_values") -> dict[str, Any]:
    return {name: torch.randn(2 + 2 * size, 3, side, side)}


_MODELS: Final = (
    _Model("llama", _llama, _tokens),
    _Model("gpt2", _gpt2, _tokens),
    _Model("bert", _bert, _tokens),
    _Model("t5", _t5, functools.partial(_tokens, decoder_input_ids=8)),
    # With every dimension symbolic, these two take Dynamo many minutes.
    _Model("bigbird", _bigbird, functools.partial(_long, length=96), mark=("input_ids", 0), firmly=False),
    _Model("reformer", _reformer, functools.partial(_long, length=64), mark=("input_ids", 0), firmly=False),
    _Model("vit", _vit, _images),
    _Model("mixtral", _mixtral, _tokens),
    _Model("wav2vec2", _wav2vec2, lambda size: {"input_values": torch.randn(2, 800 + 400 * size)}),
    _Model(
        "whisper",
        _whisper,
        lambda size: {
            "input_features": torch.randn(2 + size, 16, 64),
            "decoder_input_ids": torch.randint(3, WORDS, (2 + size, 8)),
        },
    ),
    _Model("resnet", _resnet, _images, mark=("pixel_values", 0)),
    _Model("convnext", _convnext, _images, mark=("pixel_values", 0)),
    _Model("mixer", Mixer, functools.partial(_images, name="images")),
    _Model("lennard-jones", LennardJones, lambda size: {"distance": 1 + torch.rand(32 + 16 * size)}),
)
