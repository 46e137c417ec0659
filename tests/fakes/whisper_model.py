"""A real Whisper model of tiny shape with random weights, in CTranslate2's format.

It runs the whole of faster-whisper's path (features, language detection, decoding, word times)
and hears nonsense. Built with numpy alone: no torch, no download.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from ctranslate2.specs import WhisperSpec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from voxgate import languages

LAYERS, HEADS, WIDTH = 2, 2, 32
LANGUAGES = ("en", "es", "fr", "de", "ja", "jw", "no", "yue")


def build(directory: Path, *, multilingual: bool = True, seed: int = 0) -> Path:
    """Write the model into `directory` and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = _tokenizer(directory, multilingual)
    spec = WhisperSpec(LAYERS, HEADS, LAYERS, HEADS)
    _fill(spec, np.random.default_rng(seed), len(vocabulary))
    spec.register_vocabulary(vocabulary)
    spec.config.suppress_ids = []
    spec.config.suppress_ids_begin = []
    spec.config.alignment_heads = [(1, 0), (1, 1)]
    spec.config.lang_ids = [vocabulary.index(f"<|{code}|>") for code in LANGUAGES] if multilingual else []
    spec.validate()
    spec.save(str(directory))
    (directory / "preprocessor_config.json").write_text(json.dumps({"feature_size": 80}), encoding="utf-8")
    return directory


def _tokenizer(directory: Path, multilingual: bool) -> list[str]:
    """A byte-level tokenizer with Whisper's special tokens; the vocabulary in the order of ids."""
    # CTranslate2 takes a vocabulary without the empty string as an English-only model's.
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ([""] if multilingual else [])
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|startoftranscript|>"]
    special += [f"<|{code}|>" for code in (LANGUAGES if multilingual else ())]
    special += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    special += ["<|notimestamps|>", *(f"<|{tick * 0.02:.2f}|>" for tick in range(1501))]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokens + special


def _fill(spec: WhisperSpec, random: np.random.Generator, vocabulary: int) -> None:
    def weights(*shape: int) -> np.ndarray:
        return random.normal(0, 0.2, shape).astype(np.float32)

    def norm(target: Any) -> None:
        target.gamma, target.beta = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)

    def linear(target: Any, out: int, into: int) -> None:
        target.weight, target.bias = weights(out, into), np.zeros(out, np.float32)

    def attention(target: Any, *, itself: bool) -> None:
        norm(target.layer_norm)
        shapes = [3 * WIDTH, WIDTH] if itself else [WIDTH, 2 * WIDTH, WIDTH]
        for layer, out in zip(target.linear, shapes, strict=True):
            linear(layer, out, WIDTH)

    def feed_forward(target: Any) -> None:
        norm(target.layer_norm)
        linear(target.linear_0, 4 * WIDTH, WIDTH)
        linear(target.linear_1, WIDTH, 4 * WIDTH)

    encoder, decoder = spec.encoder, spec.decoder
    for convolution, channels in ((encoder.conv1, 80), (encoder.conv2, WIDTH)):
        convolution.weight, convolution.bias = weights(WIDTH, channels, 3), np.zeros(WIDTH, np.float32)
    encoder.position_encodings.encodings = weights(1500, WIDTH)
    decoder.position_encodings.encodings = weights(448, WIDTH)
    decoder.embeddings.weight = weights(vocabulary, WIDTH)
    decoder.projection.weight = decoder.embeddings.weight
    for part in (encoder, decoder):
        norm(part.layer_norm)
        for layer in part.layer:
            attention(layer.self_attention, itself=True)
            feed_forward(layer.ffn)
    for layer in decoder.layer:
        attention(layer.attention, itself=False)


assert all(languages.parse(code) for code in LANGUAGES)
