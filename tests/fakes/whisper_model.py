"""A real Whisper model of tiny shape with random weights, in CTranslate2's format.

It runs the whole of faster-whisper's path (features, language detection, decoding, word times)
and hears nonsense. Built with numpy alone: no torch, no download.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ctranslate2.specs import WhisperSpec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from voxgate import languages
from voxgate.engines.whisper import WhisperEngine

LAYERS, HEADS, WIDTH = 2, 2, 32
# Nonsense is improbable and repeats itself, so it takes a service without guards to hear any text.
UNGUARDED = {
    "VOXGATE_WHISPER_COMPRESSION_THRESHOLD": "1000000",
    "VOXGATE_WHISPER_LOGPROB_THRESHOLD": "-1000000",
    "VOXGATE_WHISPER_NO_SPEECH_THRESHOLD": "1",
    "VOXGATE_WHISPER_BEAM": "1",
}
LANGUAGES = ("en", "es", "fr", "de", "ja", "jw", "no", "yue")


@dataclass(frozen=True, slots=True)
class Said:
    """What a window is answered with: ids of the vocabulary, their mean log-probability, and how probable it is that
    nobody spoke."""

    tokens: list[int]
    score: float = -0.2
    no_speech: float = 0.01

    @property
    def sequences_ids(self) -> list[list[int]]:
        return [self.tokens]

    @property
    def scores(self) -> list[float]:
        return [self.score]

    @property
    def no_speech_prob(self) -> float:
        return self.no_speech


class Scripted:
    """CTranslate2's model, but that somebody else says what it generates, by the prompt and the temperature of each
    window."""

    def __init__(self, model: Any, say: Callable[[list[int], float], Said]) -> None:
        self._model = model
        self._say = say
        self.prompts: list[list[int]] = []
        self.options: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, encoded: Any, prompts: Sequence[list[int]], **options: Any) -> list[Said]:
        self.prompts += prompts
        self.options.append(options)
        return [self._say(prompt, options.get("sampling_temperature", 0.0)) for prompt in prompts]


def script(engine: WhisperEngine, say: Callable[[list[int], float], Said]) -> Scripted:
    """Puts it into the engine's model's place."""
    scripted = Scripted(engine._model.model, say)
    engine._model.model = scripted
    return scripted


def timed(engine: WhisperEngine, *texts: str | float) -> list[int]:
    """The ids of texts and of times in seconds, in their order."""
    tokenizer = engine._model.hf_tokenizer
    ids: list[int] = []
    for each in texts:
        if isinstance(each, str):
            ids += tokenizer.encode(each, add_special_tokens=False).ids
        else:
            ids.append(tokenizer.token_to_id(f"<|{each:.2f}|>"))
    return ids


def service(model: Path) -> dict[str, str]:
    """What `voxgate inference` hears text with. One thread: two that wait for each other by turning in circles take
    ten times as long where another process has one of two processors. Small batches: to find out which size is the
    fastest takes an engine four seconds of its start, and gigabytes."""
    batch = {"VOXGATE_WHISPER_BATCH": "4"}
    return {"VOXGATE_WHISPER_MODEL": str(model), "OMP_NUM_THREADS": "1", **batch, **UNGUARDED}


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
