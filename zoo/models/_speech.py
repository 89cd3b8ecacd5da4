"""Attention encoder-decoder for speech with a CTC head; the models `aed`, `aed_shallow`, `firered_aed`, `ctc` are settings of it.

Papers: Whisper, arXiv:2212.04356; Canary, arXiv:2406.19674; FireRedASR, arXiv:2501.14350; hybrid CTC/attention of Watanabe
et al. 2017. Samples go in: the log-mel front end is part of the model, so weights alone transcribe.
Token 0 is padding and the CTC blank, 1 starts and 2 ends a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.base import Attention, Pattern, State
from zoo.attention.slots import AttentionFactory, Slot
from zoo.layers.audio import ConvSubsampling, LogMel, SpecAugment, padding_mask
from zoo.layers.blocks import DecoderBlock
from zoo.layers.drop import dropout_or_none
from zoo.layers.position import sine_positions
from zoo.models._speech_parts import (
    BOS,
    ENCODER_BLOCKS,
    EOS,
    PAD,
    SpeechOutput,
    check_decoding,
    check_shape,
    takes_relative,
    xavier,
)

TIME_BASE = 10000.0  # longest over shortest wavelength of the sine positions of time
LABEL_BASE = 100.0  # of labels: neighbours have to be told apart, and no sentence has thousands

__all__ = ["BOS", "EOS", "PAD", "SpeechModel", "SpeechOutput"]


class SpeechModel(nn.Module):
    """Log-mel features, strided convolutions, an encoder with a CTC head, and a decoder with cross-attention.

    Args:
        attention: Factories for slots "encoder" and, where there is a decoder, "decoder" and "cross".
        vocab_size: Number of output tokens, the three special ones included.
        sample_rate: Of the samples that go in, Hz.
        n_mels: Mel bands.
        window_ms: Analysis window.
        hop_ms: Distance of the frames.
        normalise: Of the features: "utterance", "global" or "none", see `LogMel`.
        stem: "conv1d", "conv2d" or "depthwise", see `ConvSubsampling`.
        subsampling: Frames per encoder token: 2, 4 or 8.
        stem_channels: Channels of the 2-D stems.
        encoder: Blocks of the encoder: "conformer", or "transformer", which learns more slowly (after equal time on the
            synthetic corpus 0.36 CTC character errors against 0.24).
        dim: Width C.
        num_heads: Heads; must divide `dim`.
        encoder_layers: Blocks of the encoder.
        decoder_layers: Blocks of the decoder; 0 leaves CTC alone.
        mlp_ratio: Hidden width of the MLPs over `dim`.
        conv_kernel: Taps of a Conformer's convolution, odd.
        conv_expansion: Width of that convolution over `dim`.
        ctc_per_place: Frames of the CTC head for each encoder token, cut from one wide linear map. Speech writes up to 20
            characters a second: with subsampling=8 there are fewer tokens than that.
        label_positions: Add to the cross-attention's keys and values the sine position of the number of labels that the CTC
            head has heard so far. Decoder positions count labels, encoder positions count time; without this a young decoder
            loses its place, above all where a sentence repeats a word. Kin to the label-synchronous clock of CIF,
            arXiv:1905.11235.
        position_shift: While training, decoder and label positions of an utterance are moved together by a random number up to
            this (SHAPE, arXiv:2109.05644): what counts is that they agree, so sentences longer than most are no trouble.
        wait: Wait-k decoding, arXiv:1810.08398: token i sees the first wait + i * wait_stride encoder places alone, so that
            it could be written while the rest is spoken (given an encoder as short-sighted); 0 shows the whole utterance.
        wait_stride: Places that one more token uncovers.
        position: Of the encoder: "sine" added to the tokens, "rel" Transformer-XL scores (Conformer blocks, variants that take
            a full bias), "auto" rel where the variant takes it and sine elsewhere, "none".
        dropout: After projections, in MLPs, on the embeddings.
        freq_masks, freq_width, time_masks, time_ratio, freq_warp: Change of training features, see `SpecAugment`.
    """

    name: ClassVar[str]

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        vocab_size: int = 32,
        sample_rate: int = 16000,
        n_mels: int = 64,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        normalise: str = "utterance",
        stem: str = "conv1d",
        subsampling: int = 4,
        stem_channels: int = 32,
        encoder: str = "conformer",
        dim: int = 128,
        num_heads: int = 4,
        encoder_layers: int = 3,
        decoder_layers: int = 2,
        mlp_ratio: float = 2.0,
        conv_kernel: int = 15,
        conv_expansion: int = 1,
        ctc_per_place: int = 1,
        label_positions: bool = True,
        position_shift: int = 100,
        wait: int = 0,
        wait_stride: int = 2,
        position: str = "sine",
        dropout: float = 0.0,
        freq_masks: int = 1,
        freq_width: int = 8,
        time_masks: int = 1,
        time_ratio: float = 0.05,
        freq_warp: float = 0.1,
    ) -> None:
        super().__init__()
        check_shape(dim, num_heads, encoder_layers, decoder_layers, vocab_size)
        check_decoding(wait, wait_stride, ctc_per_place, position_shift)
        self.dim, self.vocab_size, self.label_positions = dim, vocab_size, label_positions
        self.position_shift = position_shift if label_positions else 0
        self.label_base = LABEL_BASE if label_positions else TIME_BASE
        self.wait, self.wait_stride, self.ctc_per_place = wait, wait_stride, ctc_per_place
        self._tables: dict[float, Tensor] = {}
        self.front = LogMel(sample_rate, n_mels, window_ms=window_ms, hop_ms=hop_ms, normalise=normalise)
        self.augment = SpecAugment(freq_masks, freq_width, time_masks, time_ratio, freq_warp)
        self.stem = ConvSubsampling(n_mels, dim, factor=subsampling, kind=stem, channels=stem_channels)
        relative = takes_relative(position, encoder, attention["encoder"])
        self.position = "rel" if relative else "sine" if position == "auto" else position
        shared = {"mlp_ratio": mlp_ratio, "dropout": dropout}
        convolution = {"conv_kernel": conv_kernel, "conv_expansion": conv_expansion, "relative": relative}
        extra = convolution if encoder == "conformer" else {}
        self.encoder = nn.ModuleList(
            ENCODER_BLOCKS[encoder](attention["encoder"], dim, num_heads, **shared, **extra)
            for _ in range(encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(dim)
        self.ctc_head = nn.Linear(dim, ctc_per_place * vocab_size)
        self.drop = dropout_or_none(dropout)
        self.decoder = nn.ModuleList(
            DecoderBlock(attention["decoder"], attention["cross"], dim, num_heads, **shared)
            for _ in range(decoder_layers)
        )
        if decoder_layers:
            self.embedding = nn.Embedding(vocab_size, dim)
            self.decoder_norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, vocab_size, bias=False)
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    @classmethod
    def slots(cls, *, decoder_layers: int | None = None, **options: Any) -> dict[str, Slot]:
        """Encoder over padded frames; decoder and cross-attention, both decoding step by step."""
        if decoder_layers is None:
            decoder_layers = cls.default("decoder_layers")
        slots = {"encoder": Slot(Pattern.SELF, key_mask=True)}
        if options.get("position", cls.default("position")) == "rel":
            slots["encoder"] = Slot(Pattern.SELF, key_mask=True, bias="full")
        if decoder_layers:
            slots["decoder"] = Slot(Pattern.CAUSAL_SELF, streaming=True)
            slots["cross"] = Slot(Pattern.CROSS, key_mask=True, streaming=True)
            if options.get("wait", cls.default("wait")):
                slots["cross"] = Slot(Pattern.CAUSAL_CROSS, key_mask=True)
        return slots

    @classmethod
    def default(cls, option: str) -> Any:
        """Default of a constructor argument, the nearest subclass first."""
        for base in cls.__mro__:
            defaults = getattr(vars(base).get("__init__"), "__kwdefaults__", None) or {}
            if option in defaults:
                return defaults[option]
        raise KeyError(option)

    def reset_parameters(self) -> None:
        """Xavier for linear maps, a narrow normal for the embedding; a variant's own parameters keep theirs."""
        for module in self.modules():
            if isinstance(module, Attention):
                children = dict(module.named_children())
                xavier(*(children[name] for name in ("qkv", "q", "k", "v", "proj") if name in children))
        xavier(self.stem.out, self.ctc_head)
        for block in (*self.encoder, *self.decoder):
            xavier(*(m for n, m in block.named_modules() if isinstance(m, nn.Linear) and "mlp" in n))
        for block in self.decoder if self.label_positions else ():
            maps = dict(block.cross.named_children())
            if {"q", "k"} <= maps.keys() and maps["q"].weight.shape == maps["k"].weight.shape:
                # Equal positions attract each other from the first step on.
                maps["k"].load_state_dict(maps["q"].state_dict())
        if len(self.decoder):
            # Scaled by sqrt(dim) on the way in and used as it is on the way out.
            nn.init.normal_(self.embedding.weight, std=self.dim**-0.5)

    # ---------------------------------------------------------------- encoder

    def encode(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Samples [B, S] and their numbers [B] -> memory [B, M, C] and its lengths [B]."""
        features, frames = self.front(audio, lengths)
        return self.encode_features(features, frames)

    def encode_features(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features [B, T, n_mels] and valid frames [B] -> memory [B, M, C] and its lengths [B]."""
        features = self.augment(features, frames)
        x, count = self.stem(features.to(self.ctc_head.weight.dtype), frames)
        if self.position == "sine":
            x = x + self._positions(x.shape[1], x, TIME_BASE)
        x = self.drop(x)
        mask = padding_mask(count, x.shape[1])
        for block in self.encoder:
            x = block(x, key_mask=mask)
        return self.encoder_norm(x), count

    def ctc_logits(self, memory: Tensor) -> Tensor:
        """Memory [B, M, C] -> logits of the CTC head, [B, M * ctc_per_place, vocabulary]; token 0 is the blank."""
        return self.ctc_head(memory).unflatten(-1, (self.ctc_per_place, self.vocab_size)).flatten(1, 2)

    # ---------------------------------------------------------------- decoder

    @property
    def has_decoder(self) -> bool:
        return len(self.decoder) > 0

    def _embed(self, tokens: Tensor, first: int = 0, shift: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens) * math.sqrt(self.dim)
        last = first + tokens.shape[1]
        table = self._positions(last + self.position_shift, x, self.label_base)
        if shift is None:
            return self.drop(x + table[first:last])
        return self.drop(x + table[torch.arange(first, last, device=tokens.device) + shift])

    def _positions(self, count: int, like: Tensor, base: float) -> Tensor:
        """Sine table of at least the first `count` positions, kept between calls: decoding asks for it at each step."""
        table = self._tables.get(base)
        if table is None or len(table) < count or table.dtype != like.dtype or table.device != like.device:
            with torch.inference_mode(False):  # made while validating, used while training
                table = sine_positions(max(256, 2 * count), self.dim, base=base).to(like.device, like.dtype)
            if not torch.compiler.is_compiling():
                self._tables[base] = table
        return table[:count]

    @torch.no_grad()
    def labels_heard(self, memory: Tensor) -> Tensor:
        """Expected number of labels that CTC has emitted up to each place, memory [B, M, C] -> [B, M].

        A label is new where its probability was low one frame before. A place of several frames has their mean.
        """
        heard = self.ctc_logits(memory).float().softmax(-1)[..., 1:]
        before = F.pad(heard, (0, 0, 1, 0))[:, :-1]
        count = (heard * (1 - before)).sum(-1).cumsum(1)
        return count.unflatten(1, (-1, self.ctc_per_place)).mean(-1)

    def _located(self, memory: Tensor, heard: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Memory as the decoder reads it: label i, counted from 0, gets the position of the decoder's query for it."""
        if not self.label_positions:
            return memory
        heard = self.labels_heard(memory) if heard is None else heard
        places = heard - 1 if shift is None else heard - 1 + shift
        return memory + sine_positions(places, self.dim, base=self.label_base).to(memory.dtype)

    def decode(
        self, tokens: Tensor, memory: Tensor, lengths: Tensor, *, heard: Tensor | None = None
    ) -> Tensor:
        """Logits of the token after each prefix.

        Args:
            tokens: Sentences from BOS on, int [B, L].
            memory: [B, M, C].
            lengths: Valid places of `memory`, int [B].
            heard: Labels heard up to each place, [B, M]; `labels_heard(memory)` when left out.

        Returns:
            [B, L, vocabulary].
        """
        shift = None
        if self.training and self.position_shift:
            shift = torch.randint(self.position_shift + 1, (len(tokens), 1), device=tokens.device)
        x = self._embed(tokens, shift=shift)
        memory = self._located(memory, heard, shift)
        mask = padding_mask(lengths, memory.shape[1])
        seen = self._last_seen(torch.arange(tokens.shape[1], device=tokens.device), memory.shape[1])
        for block in self.decoder:
            x = block(x, memory, context_key_mask=mask, context_positions=seen)
        return self.head(self.decoder_norm(x))

    def _last_seen(self, tokens: Tensor, places: int) -> Tensor | None:
        """Last of so many places of the memory that each token may see, int [L]; None where it sees all."""
        if not self.wait:
            return None
        return (self.wait + tokens * self.wait_stride).clamp_max(places) - 1

    def init_state(self, memory: Tensor, lengths: Tensor) -> State:
        """Decoding state before BOS: the memory is projected once, the prefix is empty."""
        memory = self._located(memory)
        mask = padding_mask(lengths, memory.shape[1])
        state: State = {"length": 0, "places": memory.shape[1]}
        for i, block in enumerate(self.decoder):
            state[f"block{i}"] = block.init_state(len(memory), memory, context_key_mask=mask)
        return state

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One token a row, int [B], in; logits of the next one [B, vocabulary] and the next state out."""
        length, places = state["length"], state["places"]
        x = self._embed(tokens[:, None], length)
        new: State = {"length": length + 1, "places": places}
        seen = self._last_seen(torch.tensor([length], device=tokens.device), places) if self.wait else None
        for i, block in enumerate(self.decoder):
            x, new[f"block{i}"] = block.step(x, state[f"block{i}"], context_positions=seen)
        return self.head(self.decoder_norm(x))[:, 0], new

    # ---------------------------------------------------------------- both

    def forward(self, audio: Tensor, lengths: Tensor, tokens: Tensor | None = None) -> SpeechOutput:
        """Everything at once, as training needs it.

        Args:
            audio: Samples, [B, S].
            lengths: Samples of each utterance, int [B].
            tokens: Sentences from BOS on, int [B, L]; leave out for CTC alone.
        """
        memory, count = self.encode(audio, lengths)
        logits = self.decode(tokens, memory, count) if tokens is not None and self.has_decoder else None
        return SpeechOutput(logits, self.ctc_logits(memory), count)
