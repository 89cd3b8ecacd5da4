"""Speech to text: joint decoder and CTC loss; character and word error rates of both heads; speed and padding."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.text import CharErrorRate, WordErrorRate

from tasks.asr_analysis import Picture, analyse, readable
from tasks.asr_batches import search_batch_sizes
from tasks.base import Batch, ZooTask
from zoo.decoding import beam_search, ctc_greedy, greedy
from zoo.errors import ConfigError
from zoo.models._speech import BOS, EOS, SpeechModel, SpeechOutput


class SpeechToText(ZooTask):
    """Transcription.

    Args:
        ctc_weight: Share of the CTC loss, [0, 1]; the decoder has the rest. Models without a decoder take 1; what reads
            the CTC head (label_positions, CTC fusion) refuses 0.
        ctc_start: Share of the training during which the encoder learns by CTC alone, [0, 1): attention needs an encoder that
            hears something, and steps without the decoder are cheaper.
        label_smoothing: Of the decoder's targets, [0, 1).
        beam: Hypotheses kept in a second decoding of the test set with CTC fusion, reported as `cer_beam`; 1 leaves it out.
        decode_ctc_weight: Share of CTC scores in beam search, [0, 1].
        length_penalty: Exponent of the length normalisation in beam search.
        statistics_utterances: Training utterances from which a model with normalise=global takes its statistics.
        batch_memory_mib: Search the largest batch of each bucket whose training step fits into so much memory; None keeps the
            data's batch size.
        analysis_utterances: Test utterances for timestamps and for the analysis of cross-attention; 0 leaves both out.
    """

    monitor = "cer"
    mode = "min"
    data_kind = "speech"
    whole_to_evaluate = True

    def __init__(
        self,
        model: SpeechModel,
        data: Any,
        *,
        ctc_weight: float = 0.3,
        ctc_start: float = 0.2,
        label_smoothing: float = 0.1,
        beam: int = 1,
        decode_ctc_weight: float = 0.3,
        length_penalty: float = 0.0,
        statistics_utterances: int = 300,
        batch_memory_mib: float | None = None,
        analysis_utterances: int = 24,
        **common: Any,
    ) -> None:
        for name, value in (
            ("ctc_weight", ctc_weight),
            ("ctc_start", ctc_start),
            ("decode_ctc_weight", decode_ctc_weight),
        ):
            if not 0 <= value <= 1:
                raise ConfigError(f"task.{name}={value} is outside [0, 1]")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={label_smoothing} is outside [0, 1)")
        if beam < 1:
            raise ConfigError(f"task.beam={beam} must be at least 1")
        fused = beam > 1 and decode_ctc_weight > 0
        if model.has_decoder and not ctc_weight and (model.label_positions or fused):
            raise ConfigError(
                "task.ctc_weight=0 leaves the CTC head untrained, which model.label_positions=true and beam search with "
                "task.decode_ctc_weight read; set model.label_positions=false and task.decode_ctc_weight=0, or a "
                "task.ctc_weight above 0"
            )
        self.has_decoder = model.has_decoder
        super().__init__(model, data, **common)
        self.ctc_weight = ctc_weight if self.has_decoder else 1.0
        self.ctc_start = ctc_start if self.has_decoder and ctc_weight else 0.0
        self.label_smoothing, self.beam = label_smoothing, beam
        self.beam_metrics = nn.ModuleDict({"cer_beam": CharErrorRate(), "wer_beam": WordErrorRate()})
        self.decode_ctc_weight, self.length_penalty = decode_ctc_weight, length_penalty
        self.analysis_utterances = analysis_utterances
        self.decode = data.tokeniser.decode
        self._padding: dict[str, float] = defaultdict(float)
        self._speed: dict[str, float] = defaultdict(float)
        self.examples: list[tuple[str, str, str]] = []
        self.picture: Picture | None = None
        if model.front.normalise == "global":
            self._take_statistics(statistics_utterances)
        self.batch_memory_mib = batch_memory_mib

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        return {"vocab_size": len(data.tokeniser), "sample_rate": data.sample_rate}

    def _take_statistics(self, count: int) -> None:
        waves = readable(self.data, "train", count)
        features = [self.model.front.raw(torch.from_numpy(wave)[None])[0] for _, wave in waves]
        self.model.front.set_statistics(features)

    # ---------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        """Search batch sizes, on the device that trains, before the loaders are made."""
        if stage == "fit" and self.batch_memory_mib and self.data.duration_buckets:
            self.to(self.trainer.strategy.root_device)
            found, _ = self.data.buckets()
            self.data.batch_sizes = search_batch_sizes(self, found, self.batch_memory_mib)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        tokens, count = batch["tokens"], batch["token_length"]
        alone = self.training and self.progress() < self.ctc_start
        decode = self.has_decoder and not alone
        if not len(count):  # no recording of the batch was usable
            return {"ctc": self._of_silence(batch["audio"].device, decode)}
        inputs, targets = with_ends(tokens, count)
        out = self.model(batch["audio"], batch["audio_length"], inputs if decode else None)
        self._count(batch, out.lengths * self.model.ctc_per_place)
        terms = self.terms(out, tokens, count, targets)
        if alone:
            terms["ctc"] = terms["ctc"] / self.ctc_weight
        return terms

    def _of_silence(self, device: torch.device, decode: bool) -> Tensor:
        """Zero by way of a second of silence: with several processes each has to run the parts that the others run."""
        samples = self.data.sample_rate
        start = torch.full((1, 1), EOS, device=device) if decode else None
        out = self.model(
            torch.zeros(1, samples, device=device), torch.full((1,), samples, device=device), start
        )
        return 0.0 * sum(logits.sum() for logits in (out.ctc_logits, out.logits) if logits is not None)

    def progress(self) -> float:
        """Share of the training that is done; 1 outside training."""
        return super().progress() if self._trainer is not None and self.trainer.training else 1.0

    def terms(self, out: SpeechOutput, tokens: Tensor, count: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Weighted loss terms of a forward pass: per token, so that the length of a batch changes nothing."""
        terms = {}
        if self.ctc_weight:
            log_probs = out.ctc_logits.float().log_softmax(-1).transpose(0, 1)
            frames = out.lengths * self.model.ctc_per_place
            ctc = F.ctc_loss(log_probs, tokens, frames, count, reduction="none", zero_infinity=True)
            terms["ctc"] = self.ctc_weight * ctc.sum() / count.sum().clamp_min(1)
        if out.logits is not None and self.ctc_weight < 1:
            cross_entropy = F.cross_entropy(
                out.logits.flatten(0, 1).float(),
                targets.flatten(),
                ignore_index=-100,
                label_smoothing=self.label_smoothing,
            )
            terms["decoder"] = (1 - self.ctc_weight) * cross_entropy
        return terms

    def _count(self, batch: Batch, ctc_frames: Tensor) -> None:
        self._padding["frames"] += int(batch["audio_length"].sum())
        self._padding["padded_frames"] += batch["audio"].numel()
        self._padding["tokens"] += int(batch["token_length"].sum())
        self._padding["padded_tokens"] += batch["tokens"].numel()
        self._padding["texts"] += len(ctc_frames)
        too_long = too_long_for_ctc(batch["tokens"], batch["token_length"], ctc_frames)
        self._padding["too_long"] += int(too_long.sum())

    def on_train_epoch_end(self) -> None:
        p = self._padding
        if p["padded_frames"]:
            self.log("train/padding_frames", 1 - p["frames"] / p["padded_frames"])
            self.log("train/padding_tokens", 1 - p["tokens"] / p["padded_tokens"])
            self.log("train/too_long_for_ctc", p["too_long"] / p["texts"])
        self.reset_padding()

    def reset_padding(self) -> None:
        """Forget the padding counted so far."""
        self._padding.clear()

    # ---------------------------------------------------------------- evaluation

    def make_metrics(self) -> MetricCollection:
        heads = ("", "_ctc") if self.has_decoder else ("",)
        rates = {f"{n}{h}": m() for h in heads for n, m in (("cer", CharErrorRate), ("wer", WordErrorRate))}
        return MetricCollection(
            {**rates, "loss": MeanMetric(), "truncated": MeanMetric()}, compute_groups=False
        )

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        if not len(batch["index"]):
            return
        references = [
            self.data.split({"valid": "val"}.get(split, split))[i].text for i in batch["index"].tolist()
        ]
        began = time.perf_counter()
        memory, lengths = self.model.encode(batch["audio"], batch["audio_length"])
        ctc_logits = self.model.ctc_logits(memory)
        by_ctc = [self.decode(t) for t in ctc_greedy(ctc_logits, lengths * self.model.ctc_per_place)]
        encoded = time.perf_counter()
        hypotheses = by_ctc
        truncated = torch.zeros(len(memory))
        if self.has_decoder and not self._decoder_waits(split):
            found = greedy(self.model, memory, lengths)
            hypotheses = [self.decode(t) for t in found.tokens]
            truncated = found.truncated.float()
        if self.has_decoder:
            metrics["cer_ctc"].update(by_ctc, references)
            metrics["wer_ctc"].update(by_ctc, references)
        ended = time.perf_counter()
        metrics["cer"].update(hypotheses, references)
        metrics["wer"].update(hypotheses, references)
        metrics["truncated"].update(truncated)
        metrics["loss"].update(self._loss(batch, memory, lengths, ctc_logits))
        if split == "test":
            self._speed["audio"] += float(batch["audio_length"].sum()) / self.data.sample_rate
            self._speed["encoder"] += encoded - began
            self._speed["decoder"] += ended - encoded
            self.examples += list(zip(references, hypotheses, by_ctc, strict=True))
            if self.beam > 1 and self.has_decoder:
                self._search_beam(memory, lengths, references)

    def _decoder_waits(self, split: str) -> bool:
        """In a validation before the decoder starts to learn, CTC answers for it."""
        fitting = self._trainer is not None and self.trainer.max_epochs
        return bool(split == "valid" and fitting and super().progress() < self.ctc_start)

    def _search_beam(self, memory: Tensor, lengths: Tensor, references: list[str]) -> None:
        """Decode by beam search with CTC fusion, beside greedy decoding: `cer_beam` and `wer_beam`."""
        found = beam_search(
            self.model,
            memory,
            lengths,
            beam=self.beam,
            ctc_weight=self.decode_ctc_weight,
            length_penalty=self.length_penalty,
        )
        texts = [self.decode(t) for t in found.tokens]
        for metric in self.beam_metrics.values():
            metric.update(texts, references)

    def _loss(self, batch: Batch, memory: Tensor, lengths: Tensor, ctc_logits: Tensor) -> Tensor:
        inputs, targets = with_ends(batch["tokens"], batch["token_length"])
        logits = self.model.decode(inputs, memory, lengths) if self.has_decoder else None
        out = SpeechOutput(logits, ctc_logits, lengths)
        return sum(self.terms(out, batch["tokens"], batch["token_length"], targets).values())

    def compute_metrics(self, split: str) -> dict[str, float]:
        values = super().compute_metrics(split)
        if split == "test" and self._speed["audio"]:
            s = self._speed
            values["rtfx"] = s["audio"] / (s["encoder"] + s["decoder"])
            values["rtfx_encoder"] = s["audio"] / s["encoder"]
            if self.has_decoder:
                values["rtfx_decoder"] = s["audio"] / s["decoder"]
        if split == "test":
            if self.beam > 1 and self.has_decoder:
                values |= {name: float(metric.compute()) for name, metric in self.beam_metrics.items()}
            values |= self._further_tests()
        return values

    def _further_tests(self) -> dict[str, float]:
        """Error rates on the data's further test splits, named after them; timestamps and attention analysis."""
        values: dict[str, float] = {}
        for name in self.data.further_splits():
            metrics = self.make_metrics().to(self.device)
            for batch in self.data.loader(name):
                batch = {k: v.to(self.device) for k, v in batch.items()}
                self.update_metrics(batch, metrics, name)
            rates = {k: float(v) for k, v in metrics.compute().items() if k.startswith(("cer", "wer"))}
            values |= {f"{name}_{k}": v for k, v in rates.items()}
        if self.analysis_utterances:
            found, self.picture = analyse(self, min(self.analysis_utterances, len(self.examples)))
            values |= found
        return values

    # ---------------------------------------------------------------- records

    def example_inputs(self) -> tuple[tuple, dict]:
        """Four seconds of sound and 40 tokens."""
        samples = 4 * self.data.sample_rate
        tokens = torch.full((1, 40), EOS + 1) if self.has_decoder else None
        return (torch.zeros(1, samples), torch.tensor([samples]), tokens), {}

    def state_size(self) -> int:
        """Numbers kept for one utterance of `example_inputs` to decode its next token: both attentions of each block."""
        (_, samples, tokens), _ = self.example_inputs()
        places = int(self.model.stem.lengths(self.model.front.frames(samples)))
        count = 0 if tokens is None else tokens.shape[1]
        return sum(b.attn.state_size(count) + b.cross.state_size(places) for b in self.model.decoder)

    def card(self) -> dict[str, Any]:
        """Positions that the encoder got: "auto" depends on the variant."""
        return {"position": self.model.position}

    def figures(self, folder: Path) -> list[Path]:
        """Log-mel picture, CTC posteriors and cross-attention of a test sentence; transcripts."""
        from tasks.asr_figures import draw

        folder.mkdir(parents=True, exist_ok=True)
        return draw(self, folder)


def with_ends(tokens: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Decoder input (start token first) and targets (end token last, -100 at padding), both [B, L + 1]."""
    inputs = F.pad(tokens, (1, 0), value=BOS)
    places = torch.arange(inputs.shape[1], device=tokens.device)
    targets = F.pad(tokens, (0, 1))
    targets = torch.where(places < count[:, None], targets, torch.where(places == count[:, None], EOS, -100))
    return inputs, targets


def too_long_for_ctc(tokens: Tensor, count: Tensor, frames: Tensor) -> Tensor:
    """Texts that no path through so many CTC frames can write, bool [B]: a label a frame, and a blank between equal ones.

    Their loss is set to zero, so a share of them above zero asks for less subsampling or more `ctc_per_place`.
    """
    inside = torch.arange(tokens.shape[1], device=tokens.device)[1:] < count[:, None]
    repeats = ((tokens[:, 1:] == tokens[:, :-1]) & inside).sum(1)
    return count + repeats > frames
