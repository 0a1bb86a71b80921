"""Small tokenizers and text encoders of the classes that FLUX uses (CLIP pooled, T5 sequence),
made from the captions."""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lesa_testbed.scenes import COLOURS, MOTIONS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES, TONES

TEXT_LENGTH = 20  # the longest caption has 18 words, CLIP adds two marks
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"
# Of the prompt template of QwenImagePipeline, beside its punctuation
QWEN_TEMPLATE_WORDS = (
    *("the", "image", "by", "detailing", "color", "shape", "size", "texture", "quantity", "text"),
    *("spatial", "relationships", "of", "objects", "and"),
)
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def vocabulary(*, moving: bool = False) -> list[str]:
    """Every word of the caption grammar, sorted; with those of moving scenes if asked for."""
    phrases = [
        *SHAPES,
        *COLOURS,
        *SIZES,
        *TEXTURES,
        *TONES,
        *RELATIONS,
        *PLACES,
        "a on to background the with and",
        *(["moving", *MOTIONS] if moving else []),
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})


def clip_tokenizer(words: list[str] | None = None, max_length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """BPE trained on the vocabulary alone: each of its words becomes one token, other words fall
    apart into letters."""
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    last = [f"{letter}</w>" for letter in LETTERS]
    trainer = BpeTrainer(
        vocab_size=4000,
        initial_alphabet=list(LETTERS),
        end_of_word_suffix="</w>",
        show_progress=False,
        # numbered first: in the order of the trainer's own hash map, ties would fall at random
        special_tokens=last,
    )
    bpe.train_from_iterator(words or vocabulary(), trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = dict.fromkeys([*LETTERS, *last, *model["vocab"], "<|startoftext|>", "<|endoftext|>"])
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: every vocabulary word whole, letters as a fallback."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0)]
    pieces += [(f"▁{word}", -2.0) for word in vocabulary() if len(word) > 1 or word == "a"]
    pieces += [(letter, -12.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def clip_encoder(
    tokenizer: CLIPTokenizer, width: int = 64, layers: int = 1, cls: type = CLIPTextModel
) -> Any:
    """A text encoder of class ``cls``, CLIPTextModel or CLIPTextModelWithProjection."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config)


def t5_encoder(tokenizer: T5Tokenizer, width: int = 128) -> T5EncoderModel:
    """A two-layer T5 encoder whose heads start out looking at one neighbour each.

    FLUX gives every text token the same rotary position, so word order reaches the denoiser only
    through these features: with the usual initialisation attention is nearly uniform and which
    colour belongs to which shape would be lost.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        num_heads=8,
        d_ff=2 * width,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = T5EncoderModel(config)
    first = encoder.encoder.block[0].layer[0].SelfAttention
    buckets = config.relative_attention_num_buckets
    with torch.no_grad():
        for head, offset in enumerate(
            (-4, -3, -2, -1, 1, 2, 3, 4)
        ):  # bucket of key - query, bidirectional
            bucket = -offset if offset < 0 else buckets // 2 + offset
            first.relative_attention_bias.weight[bucket, head] += 5.0
    return encoder


def spelled(words: list[str]) -> list[tuple[str, str]]:
    """BPE merges that put each word together letter by letter from its left."""
    return list(
        dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE whose merges spell each word from its left: captions and Qwen-Image's prompt
    template become one token per word, so the template's prefix has the 34 tokens that the
    pipeline cuts off."""
    alphabet = sorted(bytes_to_unicode().values())
    # words with a space come first: their merges all begin at the space and meet no other's
    merges = spelled(
        [
            *(f"Ġ{word}" for word in vocabulary()),
            *(f"Ġ{word}" for word in QWEN_TEMPLATE_WORDS),
            *("Describe", "system", "user", "assistant"),
        ]
    )
    tokens = [*alphabet, *("".join(merge) for merge in merges), *QWEN_SPECIAL]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        additional_special_tokens=list(QWEN_SPECIAL[1:]),
        model_max_length=1024,
    )


def qwen_encoder(tokenizer: Qwen2Tokenizer, width: int = 128) -> Qwen2_5_VLForConditionalGeneration:
    """A two-layer causal language model of Qwen2.5-VL's class, with a token vision tower."""
    heads, head_dim = width // 32, 32
    ids = dict(
        zip(QWEN_SPECIAL[3:], tokenizer.convert_tokens_to_ids(list(QWEN_SPECIAL[3:])), strict=True)
    )
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [head_dim // 8, head_dim // 8, head_dim // 4],
            },
            max_position_embeddings=1024,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=1, out_hidden_size=width
        ),
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def llama_tokenizer(max_length: int) -> LlamaTokenizer:
    """BPE that makes one token of each word of the captions of moving scenes."""
    words = vocabulary(moving=True)
    merges = spelled([f"▁{word}" for word in words])
    tokens = ["<unk>", "<s>", "</s>", "▁", *LETTERS, *("".join(merge) for merge in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        pad_token="</s>",
        padding_side="right",
        model_max_length=max_length,
        add_bos_token=True,  # the empty caption has a token too: the denoiser averages over them
    )


def llama_encoder(tokenizer: LlamaTokenizer, width: int = 64) -> LlamaModel:
    """Four causal layers, of which HunyuanVideo reads the second."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaModel(config)
