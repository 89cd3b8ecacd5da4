"""Speech to text: losses, metrics, every variant, prediction."""

import json

import numpy as np
import pytest
import soundfile
import torch

from data import create_data
from tasks.asr import SpeechToText, with_ends
from zoo.attention.registry import list_attention
from zoo.attention.slots import resolve_slots
from zoo.errors import CapabilityError, ConfigError, DataError
from zoo.models.registry import build_model, get_model
from zoo.predict.asr import TaskPredictor, quiet_cuts


@pytest.fixture(scope="module")
def tones():
    data = create_data("tones", train_size=48, val_size=8, test_size=8, batch_size=16)
    data.setup()
    return data


def make(data, name="aed", attention="softmax", task_options=None, **options):
    torch.manual_seed(0)
    options = {"dim": 32, "num_heads": 2, "n_mels": 24, "encoder_layers": 2, **options}
    options |= SpeechToText.model_arguments(data)
    slots = resolve_slots(get_model(name).slots(**options), {"name": attention}, task="asr")
    return SpeechToText(build_model(name, slots, **options), data, **(task_options or {}))


def train(task, steps, lr=2e-3):
    optimizer = torch.optim.AdamW(task.model.parameters(), lr)
    loader, losses = task.data.train_dataloader(), []
    for epoch in range(1000):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = sum(task.losses(batch).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            if len(losses) == steps:
                return losses


@pytest.mark.parametrize("attention", list_attention())
def test_every_variant_trains_or_says_why_not(tones, attention):
    """Each variant fills the slots that it defines and gives finite gradients, or refuses with the way out."""
    try:
        task = make(tones, attention=attention)
    except CapabilityError as error:
        assert "try attention@" in str(error) or "variants that do" in str(error)
        return
    task.train()
    losses = train(task, 2)
    assert np.isfinite(losses).all()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in task.model.parameters())
    task.eval()
    metrics = task.make_metrics()
    with torch.no_grad():
        task.update_metrics(next(iter(tones.val_dataloader())), metrics, "valid")
    assert {"cer", "wer", "cer_ctc", "loss"} <= set(metrics.compute())


@pytest.mark.parametrize("name", ["firered_aed", "aed_shallow", "ctc"])
def test_every_model_trains(tones, name):
    task = make(tones, name, stem_channels=4)
    losses = train(task.train(), 12)
    assert losses[-1] < losses[0]
    assert ("cer_ctc" in task.make_metrics()) == (name != "ctc")
    assert task.card()["position"] == ("rel" if name == "firered_aed" else "sine")


@pytest.mark.slow
def test_learns_tones():
    """From nothing to under 10 % character errors on unseen strings; the answer without listening has 80 % or more."""
    data = create_data("tones", train_size=512, val_size=32, test_size=64, batch_size=32)
    task = make(data, dim=64, encoder_layers=2, decoder_layers=1, dropout=0.0, position_shift=0)
    train(task.train(), 450)
    task.eval()
    with torch.no_grad():
        for batch in data.test_dataloader():
            task.test_step(batch, 0)
    scores = task.compute_metrics("test")
    assert min(b["cer"] for b in data.baselines().values()) > 0.7
    assert scores["cer_ctc"] < 0.1 and scores["cer"] < 0.25
    assert scores["rtfx"] > 1


def test_targets():
    inputs, targets = with_ends(torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([3, 1]))
    assert inputs.tolist() == [[1, 5, 6, 7], [1, 8, 0, 0]]
    assert targets.tolist() == [[5, 6, 7, 2], [8, 2, -100, -100]]


def test_loss_ignores_padding(tones):
    """A batch padded further, in sound and in text, has the same loss."""
    task = make(tones).eval()
    batch = next(iter(tones.val_dataloader()))
    wider = dict(batch)
    wider["audio"] = torch.nn.functional.pad(batch["audio"], (0, 3333), value=0.3)
    wider["tokens"] = torch.nn.functional.pad(batch["tokens"], (0, 5))
    with torch.no_grad():
        a, b = task.losses(batch), task.losses(wider)
    for key in a:
        assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4)


def test_empty_batch_is_harmless(tones):
    """A batch of which no recording was usable gives a loss of zero with gradients, and counts nowhere in the metrics."""
    from data.sampler import BatchKey

    task = make(tones).train()
    batch = tones.batch("train", BatchKey(np.zeros(0, dtype=np.int64), 0, 0))
    loss = sum(task.losses(batch).values())
    loss.backward()
    assert float(loss.detach()) == 0 and all(p.grad is not None for p in task.model.parameters())
    metrics = task.make_metrics()
    task.eval().update_metrics(batch, metrics, "valid")
    assert not task.examples and all(not m.update_called for m in metrics.values())


@pytest.fixture
def damaged(tones, monkeypatch):
    """The first training and the first test recording cannot be read, as headers alone do not tell."""
    whole, bad = tones.samples, {tones.split("train")[0].id, tones.split("test")[0].id}

    def samples(utterance):
        if utterance.id in bad:
            raise DataError(f"{utterance.id} holds NaN or infinite samples")
        return whole(utterance)

    monkeypatch.setattr(tones, "samples", samples)
    return tones


def test_unusable_recordings_end_neither_statistics_nor_analysis(damaged):
    options = {"statistics_utterances": 4, "analysis_utterances": 3}
    task = make(damaged, normalise="global", task_options=options).eval()
    assert float(task.model.front.std.max()) != 1.0
    with torch.no_grad():
        for batch in damaged.test_dataloader():
            task.test_step(batch, 0)
    assert np.isfinite(task.compute_metrics("test")["timestamp_ctc_ms"])
    assert task.picture.text == damaged.split("test")[1].text
    assert damaged.split("test")[0].id in damaged.skipped


def test_texts_that_ctc_cannot_write_are_counted(tones):
    """More labels, and blanks between equal ones, than frames: CTC's loss is zero there, which would look like success."""
    from tasks.asr import too_long_for_ctc

    tokens = torch.tensor([[3, 4, 5, 0], [3, 3, 3, 0], [3, 4, 5, 6], [3, 0, 0, 0]])
    count, frames = torch.tensor([3, 3, 4, 1]), torch.tensor([3, 4, 3, 1])
    assert too_long_for_ctc(tokens, count, frames).tolist() == [False, True, True, False]
    assert too_long_for_ctc(tokens[:, :0], 0 * count, frames).tolist() == [False] * 4
    task, logged = make(tones, subsampling=8, hop_ms=13.0).train(), {}
    for batch in tones.train_dataloader():
        task.losses(batch)
    task.log = lambda name, value: logged.update({name: value})
    task.on_train_epoch_end()
    assert 0 < logged["train/too_long_for_ctc"] < 1 and not task._padding


def test_metrics_are_corpus_level(tones):
    """Rates over the whole split do not depend on the batches it comes in."""
    from data.speech_baselines import error_rates

    task = make(tones).eval()
    results = []
    for size in (8, 3):
        tones.eval_batch_size = size
        metrics = task.make_metrics()
        task.examples.clear()
        with torch.no_grad():
            for batch in tones.test_dataloader():
                task.update_metrics(batch, metrics, "test")
        results.append({k: float(v) for k, v in metrics.compute().items() if k != "loss"})
    assert results[0]["cer"] == pytest.approx(results[1]["cer"])
    references, hypotheses, _ = zip(*task.examples, strict=True)
    assert results[0]["cer"] == pytest.approx(error_rates(hypotheses, references)["cer"], abs=1e-6)
    assert results[0]["wer"] == pytest.approx(error_rates(hypotheses, references)["wer"], abs=1e-6)


def test_beam_and_analysis_are_reported(tones):
    """Beam search adds its own rates beside greedy ones; timestamps and attention analysis come with the test."""
    task = make(tones, task_options={"beam": 2, "analysis_utterances": 3}).eval()
    with torch.no_grad():
        for batch in tones.test_dataloader():
            task.test_step(batch, 0)
    scores = task.compute_metrics("test")
    assert {"cer", "wer", "cer_ctc", "cer_beam", "wer_beam", "rtfx", "rtfx_decoder"} <= set(scores)
    assert {"timestamp_ctc_ms", "timestamp_dtw_ms", "xattn_memory_r", "xattn_input_r"} <= set(scores)
    assert -1 <= scores["xattn_memory_r"] <= 1


@pytest.mark.parametrize("attention", ["mala", "kda"])
def test_signed_maps_are_analysed(tones, tmp_path, attention):
    """Mixing matrices with negative weights have timestamps, correlations and an alignment figure too."""
    task = make(tones, attention=attention, task_options={"analysis_utterances": 2}).eval()
    assert all(block.cross.capabilities.signed_map for block in task.model.decoder)
    with torch.no_grad():
        for batch in tones.test_dataloader():
            task.test_step(batch, 0)
    scores = task.compute_metrics("test")
    assert all(-1 <= scores[f"xattn_{source}_r"] <= 1 for source in ("memory", "input"))
    assert np.isfinite(scores["timestamp_dtw_ms"])
    assert tmp_path / "alignment.png" in task.figures(tmp_path)


def test_figures(tones, tmp_path):
    """Transcripts, alignment and padding figures are drawn."""
    task = make(tones).eval()
    with torch.no_grad():
        for batch in tones.test_dataloader():
            task.test_step(batch, 0)
    task.compute_metrics("test")
    files = task.figures(tmp_path / "figures")
    assert {f.name for f in files} == {"transcripts.txt", "alignment.png", "padding.png"}
    assert all(f.stat().st_size > 500 for f in files)


def test_batch_sizes_against_a_memory_limit():
    """Each bucket gets the largest batch that fits, within 5 %; shorter buckets get larger ones."""
    from tasks.asr_batches import search_batch_sizes, step_memory_mib

    data = create_data("tones", train_size=400, duration_buckets=3, token_buckets=1)
    data.setup()
    task = make(data, encoder_layers=1, decoder_layers=1)
    buckets, _ = data.buckets()
    sizes = search_batch_sizes(task, buckets, 24.0)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    for bucket, size in zip(buckets, sizes, strict=True):
        used = step_memory_mib(task, size, bucket.max_duration_s, bucket.max_tokens)
        more = step_memory_mib(task, int(size * 1.06) + 1, bucket.max_duration_s, bucket.max_tokens)
        assert used <= 24.0 and (more > 24.0 or size == len(bucket.members))
    with pytest.raises(ConfigError, match="not even one"):
        search_batch_sizes(task, buckets, 0.5)
    data.wave_augment.speeds = [0.5, 1.0]  # audio played at half speed is twice as long
    slower = search_batch_sizes(task, buckets[-1:], 24.0)
    assert slower[0] < 0.75 * sizes[-1]  # weights take the same


def test_global_statistics(tones):
    """normalise=global makes the training features' bands of mean 0 and deviation 1, and stores that in the weights."""
    task = make(tones, normalise="global", task_options={"statistics_utterances": 48})
    features = []
    for batch in tones.loader("train"):
        x, frames = task.model.front(batch["audio"], batch["audio_length"])
        features += [row[:n] for row, n in zip(x, frames.tolist(), strict=True)]
    x = torch.cat(features)
    assert float(x.mean(0).abs().max()) < 0.05 and float((x.std(0) - 1).abs().max()) < 0.05
    assert "front.mean" in task.model.state_dict()


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"ctc_weight": 2}, "ctc_weight"),
        (
            {"ctc_weight": 0},
            "set model.label_positions=false and task.decode_ctc_weight=0, or a task.ctc_weight",
        ),
        ({"beam": 0}, "beam"),
        ({"label_smoothing": 1}, "smoothing"),
    ],
)
def test_bad_options(tones, options, hint):
    with pytest.raises(ConfigError, match=hint):
        make(tones, task_options=options)


def test_without_ctc_nothing_is_read_from_its_head(tones):
    none = {"ctc_weight": 0, "beam": 4}
    with pytest.raises(ConfigError, match="decode_ctc_weight=0"):
        make(tones, label_positions=False, task_options=none)
    make(tones, label_positions=False, task_options={**none, "decode_ctc_weight": 0})
    make(tones, "ctc", task_options=none)  # has no decoder, and learns by CTC whatever the weight


# ------------------------------------------------------------------------------------------- prediction


def predictor(data, name="aed"):
    task = make(data, name)
    return TaskPredictor(task.model.eval(), {"preprocessing": data.preprocessing()})


@pytest.mark.parametrize("name", ["aed", "ctc"])
def test_prediction_from_files(tones, tmp_path, name):
    """A file of any rate gives text and words in time order; the card alone is enough."""
    p = predictor(tones, name)
    json.dumps(p.preprocessing)
    path = tmp_path / "a.flac"
    rng = np.random.default_rng(0)
    soundfile.write(path, 0.1 * rng.standard_normal((16000, 2)), 16000)
    found = p.predict(path)
    assert found["duration_s"] == pytest.approx(1.0, abs=0.01)
    times = [t for w in found["words"] for t in (w["start_s"], w["end_s"])]
    assert times == sorted(times)
    assert found["text"].split() == [w["word"] for w in found["words"]]
    assert str(path) in p.format(path, found)


def test_odd_recordings(tones, tmp_path):
    """Silence and clicks say nothing; empty, NaN, missing and foreign files are named; ten minutes come in parts."""
    p = predictor(tones)
    assert p.predict((np.zeros(8000), 8000))["text"] == ""
    assert p.predict((np.full(80, 0.1), 8000))["text"] == ""
    for raw, hint in (
        ((np.zeros(0), 8000), "no audio"),
        ((np.array([0.0, np.nan] * 4000), 8000), "NaN"),
        (tmp_path / "none.wav", "no audio file"),
    ):
        with pytest.raises(DataError, match=hint):
            p.predict(raw)
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(DataError, match="not readable"):
        p.predict(tmp_path / "text.wav")
    rng = np.random.default_rng(0)
    quiet = np.zeros(600 * 8000, dtype=np.float32)
    quiet[: 3 * 8000] = 0.1 * rng.standard_normal(3 * 8000)
    found = p.predict((quiet, 8000))
    assert found["duration_s"] == 600.0 and found["chunks"] > 100


def test_cuts_are_quiet_and_complete():
    rng = np.random.default_rng(0)
    wave = rng.standard_normal(50_000).astype(np.float32)
    for begin in range(6000, 50_000, 7000):
        wave[begin : begin + 800] = 0
    bounds = quiet_cuts(wave, 8000, 10_000)
    assert bounds[0][0] == 0 and bounds[-1][1] == 50_000
    assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:], strict=False))
    assert all(0 < end - begin <= 10_000 for begin, end in bounds)
    for _, end in bounds[:-1]:
        assert np.abs(wave[end - 100 : end + 100]).max() == 0
    assert quiet_cuts(wave[:50], 8000, 10_000) == [(0, 50)]


# ------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", ["aed", "aed_shallow", "firered_aed", "ctc"])
def test_model_yaml_equals_the_signature(name):
    from pathlib import Path

    from omegaconf import OmegaConf

    from zoo.models.registry import model_options

    stored = OmegaConf.to_container(OmegaConf.load(Path(f"conf/model/{name}.yaml")))
    assert stored.pop("name") == name
    assert stored == model_options(name)


@pytest.mark.parametrize("name", ["espeak", "tones", "librispeech", "speech_manifest", "asterisk"])
def test_data_yaml_equals_the_signature(name):
    from pathlib import Path

    from omegaconf import OmegaConf

    from data import data_options

    stored = OmegaConf.to_container(OmegaConf.load(Path(f"conf/data/{name}.yaml")))
    assert stored.pop("name") == name
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in data_options(name).items()}
    assert stored == plain


@pytest.mark.parametrize("choice", [["task=asr"], ["experiment=asr_long"], ["experiment=asr_real"]])
def test_configurations_compose(choice):
    from pathlib import Path

    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        cfg = compose("config", choice)
    from data import data_options
    from tasks.registry import options_of

    assert cfg.task.kind == "asr"
    assert set(cfg.task) - {"name", "kind"} <= set(options_of(SpeechToText))
    assert set(cfg.data) - {"name"} <= set(data_options(cfg.data.name))
