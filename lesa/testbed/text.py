"""Small tokenizers and text encoders of the classes that FLUX uses (CLIP pooled, T5 sequence),
made from the captions."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from lesa.testbed.scenes import COLOURS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES, TONES

TEXT_LENGTH = 20  # the longest caption has 18 words, CLIP adds two marks
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"


def vocabulary() -> list[str]:
    """Every word of the caption grammar, sorted."""
    phrases = [
        *SHAPES,
        *COLOURS,
        *SIZES,
        *TEXTURES,
        *TONES,
        *RELATIONS,
        *PLACES,
        "a on to background the with and",
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})


def clip_tokenizer() -> CLIPTokenizer:
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
    bpe.train_from_iterator(vocabulary(), trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = dict.fromkeys([*LETTERS, *last, *model["vocab"], "<|startoftext|>", "<|endoftext|>"])
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: every vocabulary word whole, letters as a fallback."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0)]
    pieces += [(f"▁{word}", -2.0) for word in vocabulary() if len(word) > 1 or word == "a"]
    pieces += [(letter, -12.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def clip_encoder(tokenizer: CLIPTokenizer, width: int = 64) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


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
