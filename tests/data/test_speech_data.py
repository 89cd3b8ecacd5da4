"""Speech data: formats, defects, buckets, tokenisers, augmentation, synthesis."""

import json

import numpy as np
import pytest
import soundfile
import torch

from data import DataError, create_data, speech_text
from data.sampler import BatchKey
from data.speech_augment import WaveAugment
from data.speech_baselines import edit_distance, error_rates
from data.speech_bucketing import BucketSampler, make_buckets, search_batch_size
from data.speech_tokenisers import BpeTokeniser, CharTokeniser, normalise
from tasks.asr_figures import log_normal_sample, padding_of_sample
from zoo.audio import read_audio


def beep(seconds=0.5, rate=16000, hz=440.0):
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("suffix", "rate"), [("wav", 8000), ("flac", 16000), ("ogg", 44100), ("wav", 22050)])
def test_any_rate_and_format(tmp_path, suffix, rate):
    """A tone keeps its frequency and length; stereo is mixed down."""
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([beep(rate=rate), 0.5 * beep(rate=rate)], 1), rate)
    wave = read_audio(path, 16000)
    assert wave.dtype == np.float32 and abs(len(wave) - 8000) <= 8
    spectrum = np.abs(np.fft.rfft(wave[:8000] * np.hanning(8000)))
    assert abs(int(spectrum.argmax()) * 2 - 440) <= 4
    assert np.abs(wave[1000:7000]).max() == pytest.approx(0.225, rel=0.15)


@pytest.mark.parametrize(
    ("rate", "wanted"), [(22050, 16000), (8000, 16000), (44100, 16000), (48000, 16000), (16001, 16000)]
)
def test_resampling(rate, wanted):
    """A tone below both limits is kept to -80 dB; one above the new limit goes."""
    from zoo.audio import resample

    tone = np.sin(2 * np.pi * 300 * np.arange(rate) / rate).astype(np.float32)
    new = resample(tone, rate, wanted)
    assert len(new) == wanted
    expected = np.sin(2 * np.pi * 300 * np.arange(wanted) / wanted)
    assert np.abs(new - expected)[200:-200].max() < (1e-2 if rate == 16001 else 1e-4)
    if rate > 2.5 * wanted:
        high = np.sin(2 * np.pi * 0.7 * wanted * np.arange(rate) / rate).astype(np.float32)
        assert np.abs(resample(high, rate, wanted)[200:-200]).max() < 1e-2
    for size in (0, 1, 2, 441):
        assert len(resample(np.ones(size, np.float32), 22050, 16000)) == -(-size * 16000 // 22050)


def librispeech(root, speakers=4, defects=True):
    rng = np.random.default_rng(0)
    for split, names in (("train-clean-5", range(speakers)), ("dev-clean-2", (90,)), ("test-clean", (91,))):
        for speaker in names:
            folder = root / split / str(speaker) / "7"
            folder.mkdir(parents=True)
            lines = []
            for i in range(3):
                name = f"{speaker}-7-{i:04d}"
                soundfile.write(folder / f"{name}.flac", rng.normal(0, 0.1, 8000), 16000)
                lines.append(f"{name} SAY IT'S {'ABC'[i]}")
            if defects and split.startswith("train") and speaker == 0:
                lines.append(f"{speaker}-7-9999 NO SUCH FILE")
            (folder / f"{speaker}-7.trans.txt").write_text("\n".join(lines) + "\n")


def test_librispeech_tree(tmp_path):
    librispeech(tmp_path)
    data = create_data("librispeech", root=str(tmp_path))
    data.setup()
    assert data.split_record()["sizes"] == {"train": 12, "val": 3, "test": 3}
    assert data.split("train")[0].text == "say it's a"
    assert list(data.skipped) == ["0-7-9999"] and "no audio file" in data.skipped["0-7-9999"]
    batch = next(iter(data.train_dataloader()))
    assert batch["audio"].shape == (12, 8000)
    text = data.tokeniser.decode(batch["tokens"][0].tolist())
    assert text == data.split("train")[int(batch["index"][0])].text


def test_transcripts_in_another_encoding_are_named(tmp_path):
    librispeech(tmp_path, defects=False)
    listing = tmp_path / "train-clean-5" / "1" / "7" / "1-7.trans.txt"
    listing.write_bytes(b"1-7-0000 CAF\xc9\n" + listing.read_bytes().split(b"\n", 1)[1])
    data = create_data("librispeech", root=str(tmp_path))
    data.setup()
    assert len(data.split("train")) == 11 and list(data.skipped) == ["1-7-0000"]
    assert "is no UTF-8" in data.skipped["1-7-0000"]
    table = tmp_path / "t.csv"
    table.write_bytes(b"path,text\n" + b"".join(b"%d.wav,caf\xe9\n" % i for i in range(3)))
    with pytest.raises(DataError, match="no usable utterance.*is no UTF-8"):
        create_data("speech_manifest", train=str(table)).setup()


def test_librispeech_sets_speakers_aside(tmp_path):
    librispeech(tmp_path, speakers=6)
    data = create_data("librispeech", root=str(tmp_path), val=[], test=[], val_share=0.2, test_share=0.2)
    voices = {split: {u.speaker for u in data.split(split)} for split in ("train", "val", "test")}
    assert all(voices.values())
    assert not voices["train"] & (voices["val"] | voices["test"]) and not voices["val"] & voices["test"]


def test_defects_are_skipped_counted_and_named(tmp_path):
    """Missing file, empty file, NaN, too short, too long, foreign characters, no text, broken lines."""
    soundfile.write(tmp_path / "good.wav", beep(), 16000)
    soundfile.write(tmp_path / "empty.wav", beep(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "click.wav", beep(0.01), 16000)
    soundfile.write(tmp_path / "long.wav", np.zeros(601 * 1000), 1000)
    (tmp_path / "noise.wav").write_bytes(b"this is no audio")
    lines = [
        {"audio_filepath": "good.wav", "text": f"Fine, number {w}!"} for w in ("one", "two", "three", "four")
    ]
    lines += [
        {"audio_filepath": f"{name}.wav", "text": "hello"}
        for name in ("missing", "empty", "nan", "click", "long", "noise")
    ]
    lines += [
        {"audio_filepath": "good.wav", "text": "\u4f60\u597d"},
        {"audio_filepath": "good.wav", "text": "..."},
        {"audio_filepath": "good.wav"},
        {"audio_filepath": "good.wav", "text": "x", "duration": "long"},
        {"audio_filepath": "good.wav", "text": "part", "offset": 0.1, "duration": 0.2},
        {"audio_filepath": "good.wav", "text": "behind", "offset": 9},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n[1]\n")
    data = create_data("speech_manifest", train=str(manifest), check="full", val_share=0.2, test_share=0.2)
    data.setup()
    assert sum(data.split_record()["sizes"].values()) == 5
    part = next(u for s in ("train", "val", "test") for u in data.split(s) if u.text == "part")
    assert len(data.samples(part)) == 3200
    reasons = "\n".join(f"{k} {v}" for k, v in data.skipped.items())
    assert len(data.skipped) == 13
    for hint in ("no audio file", "holds no audio", "NaN", "lasts 0.01 s", "lasts 601.00 s", "not readable", "characters",
                 "has no text", "has no a text", "no number", "no JSON", "no JSON object", "behind 9"):  # fmt: skip
        assert hint in reasons, hint


def test_defect_found_while_training_leaves_the_batch(tmp_path):
    """With check=header a recording with NaN samples is dropped from its batch and named."""
    for i in range(6):
        wave = np.full(8000, np.nan) if i == 3 else beep()
        soundfile.write(tmp_path / f"{i}.wav", wave, 16000, subtype="FLOAT")
    table = "path,sentence\n" + "".join(f"{i}.wav,text {'abcdef'[i]}\n" for i in range(6))
    (tmp_path / "t.csv").write_text(table)
    (tmp_path / "v.tsv").write_text('path\tsentence\tclient_id\n0.wav\tsay "a\tann\n')
    data = create_data(
        "speech_manifest",
        train=str(tmp_path / "t.csv"),
        val=str(tmp_path / "v.tsv"),
        test=str(tmp_path / "v.tsv"),
    )
    sizes = [len(b["audio"]) for b in data.train_dataloader()]
    assert sum(sizes) == 5 and any("NaN" in r for r in data.skipped.values())
    assert all(len(v) == 0 for v in data.batch("train", BatchKey(np.array([3]), 0, 0)).values())
    assert data.split("val")[0].text == "say a" and data.split("val")[0].speaker == "ann"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_split_without_any_usable_recording_is_an_error(tmp_path, num_workers):
    """Headers were fine, every recording holds NaN: said at the first batch, instead of training on nothing."""
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    (tmp_path / "t.csv").write_text("path,text\n" + "".join(f"{i}.wav,hello\n" for i in range(4)))
    name = str(tmp_path / "t.csv")
    options = {"batch_size": 2, "duration_buckets": 1, "num_workers": num_workers}
    data = create_data("speech_manifest", train=name, val=name, test=name, **options)
    with pytest.raises(DataError, match="none of the 4 recordings of split train.*NaN"):
        list(data.train_dataloader())
    assert len(data.skipped) == 4


def test_what_worker_processes_find_is_named_here(tmp_path):
    for i in range(3):
        wave = np.full(8000, np.nan) if i == 1 else beep()
        soundfile.write(tmp_path / f"{i}.wav", wave, 16000, subtype="FLOAT")
    (tmp_path / "t.csv").write_text("path,text\n" + "".join(f"{i}.wav,hello\n" for i in range(3)))
    name = str(tmp_path / "t.csv")
    data = create_data("speech_manifest", train=name, val=name, test=name, num_workers=1)
    assert [b["index"].tolist() for b in data.val_dataloader()] == [[0, 2]]
    assert "NaN" in data.skipped["t.csv:2"]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({}, "data.train="),
        ({"train": "/nowhere.jsonl"}, "no manifest"),
        ({"train": "x.jsonl", "tokeniser": "word"}, "char or bpe"),
        ({"train": "x.jsonl", "normaliser": "upper"}, "plain-1"),
        ({"train": "x.jsonl", "speeds": [9.0]}, "between 0.5 and 2"),
        ({"train": "x.jsonl", "max_s": 0.01}, "at least"),
    ],
)
def test_bad_options(options, hint):
    with pytest.raises(DataError, match=hint):
        create_data("speech_manifest", **options).setup()


# ------------------------------------------------------------------------------------------- texts


def test_normalisation():
    assert normalise("  It\u2019s  Caf\u00e9-time, \u201cnow\u201d! ", "plain-1") == "it's cafe time now"
    assert normalise("A-B  c", "lower-1") == "a-b c" and normalise("A  b", "none") == "A  b"


def test_tokenisers_give_the_text_back():
    texts = [t for t, _ in speech_text.sentences(300, 0)]
    for tokeniser in (CharTokeniser(), BpeTokeniser(texts, 120, " 'abcdefghijklmnopqrstuvwxyz")):
        for text in texts:
            tokens = tokeniser.encode(text)
            assert min(tokens) >= 3 and max(tokens) < len(tokeniser) and tokeniser.decode(tokens) == text
        assert tokeniser.encode("") == []
        with pytest.raises(DataError, match="'\u00e9'"):
            tokeniser.encode("caf\u00e9")
    assert len(tokeniser) == 120
    assert len(tokeniser.encode(texts[0])) < len(texts[0])


def test_sentences():
    """At least 800 words, names, numbers, spelled strings; letters alone are spoken from capitals."""
    assert len(speech_text.vocabulary()) >= 800
    pairs = list(speech_text.sentences(3000, 0))
    words = {w for written, _ in pairs for w in written.split()}
    assert words <= speech_text.vocabulary() and len(words) >= 800
    assert len({w for w, _ in pairs}) == 3000
    assert all(said.lower() == written for written, said in pairs)
    assert sum(any(c.isupper() for c in said) for _, said in pairs) > 200
    assert speech_text.number_words(1042) == "one thousand forty two"
    assert speech_text.number_words(999999).startswith("nine hundred ninety nine thousand")
    taken = {w for w, _ in pairs}
    assert not taken & {w for w, _ in speech_text.sentences(500, 1, set(taken))}


def test_error_rates_are_corpus_level():
    from torchmetrics.text import CharErrorRate, WordErrorRate

    hypotheses, references = ["a b c", "", "the cat sat", "x"], ["a c", "hello", "the cat sat", ""]
    rates = error_rates(hypotheses, references)
    assert rates["wer"] == pytest.approx(float(WordErrorRate()(hypotheses, references)))
    assert rates["cer"] == pytest.approx(float(CharErrorRate()(hypotheses, references)))
    assert rates["wer"] == pytest.approx(3 / 6)
    assert error_rates([""], [""]) == {"cer": 0.0, "wer": 0.0}
    assert edit_distance("kitten", "sitting") == 3


# ------------------------------------------------------------------------------------------- buckets


def test_buckets_take_padding_below_a_tenth():
    """On log-normal lengths random batches are padding by seven tenths, thirty buckets (the paper's number) under 10 %."""
    ratios = padding_of_sample()
    assert ratios["random"]["seconds"] > 0.6 and ratios["30 buckets"]["seconds"] < 0.1
    assert ratios["sorted"]["seconds"] < ratios["30 buckets"]["seconds"]
    assert ratios["30 x 2 buckets"]["tokens"] < ratios["30 buckets"]["tokens"] < 0.35


def test_buckets_partition_by_equal_duration():
    durations, tokens = log_normal_sample()
    buckets = make_buckets(durations, tokens, buckets=8)
    members = np.concatenate([b.members for b in buckets])
    assert sorted(members.tolist()) == list(range(len(durations)))
    sums = [durations[b.members].sum() for b in buckets]
    assert max(sums) / min(sums) < 1.1
    for shorter, longer in zip(buckets, buckets[1:], strict=False):
        assert shorter.max_duration_s <= durations[longer.members].min()


def test_equal_durations_give_their_cuts_to_tokens():
    """Where every clip lasts 30 s, buckets differ by their texts instead."""
    tokens = np.arange(1, 401)
    buckets = make_buckets(np.full(400, 30.0), tokens, buckets=4, token_buckets=2)
    assert len(buckets) == 8 and all(b.max_duration_s == 30.0 for b in buckets)
    assert [b.max_tokens for b in buckets] == sorted(b.max_tokens for b in buckets)


def test_ranks_draw_the_same_bucket():
    """At each step all processes have the same bucket and different utterances; epochs differ and repeat."""
    durations, tokens = log_normal_sample(1003)
    buckets = make_buckets(durations, tokens, buckets=5)
    of = {int(i): n for n, b in enumerate(buckets) for i in b.members}
    ranks = [BucketSampler(buckets, [16] * 5, seed=3, rank=r, world_size=3) for r in range(3)]
    keys = [list(sampler) for sampler in ranks]
    assert len({len(k) for k in keys}) == 1 and len(keys[0]) == len(ranks[0])
    for step in zip(*keys, strict=True):
        assert len({of[int(i)] for key in step for i in key.indices}) == 1
        assert len({len(key.indices) for key in step}) == 1
    seen = [int(i) for k in keys for key in k for i in key.indices]
    assert len(seen) == len(set(seen)) > 985
    ranks[0].set_epoch(1)
    other = list(ranks[0])
    assert [k.indices.tolist() for k in other] != [k.indices.tolist() for k in keys[0]]
    ranks[0].set_epoch(0, start_batch=7)
    assert [k.indices.tolist() for k in ranks[0]] == [k.indices.tolist() for k in keys[0][7:]]


@pytest.mark.parametrize("threshold", [0, 1, 2, 31, 32, 33, 100, 777, 5000])
def test_batch_size_search(threshold):
    """Within 5 % below the largest size that fits, in few trials."""
    tried = []

    def fits(size):
        tried.append(size)
        return size <= threshold

    found = search_batch_size(fits)
    assert 0.95 * threshold - 1 <= found <= threshold and len(tried) < 20
    assert search_batch_size(lambda size: True, limit=100) == 100


# ------------------------------------------------------------------------------------------- augmentation


def test_augmentation_depends_on_its_key_alone():
    wave = beep(1.0)
    augment = WaveAugment(16000, noise_snr_db=[10, 10], noise_share=1.0, speeds=[0.9, 1.1], gain_db=3)
    a, b, c = augment(wave, (0, 1, 2)), augment(wave, (0, 1, 2)), augment(wave, (0, 1, 3))
    assert np.array_equal(a, b) and not (len(a) == len(c) and np.array_equal(a, c))
    assert abs(len(a) / len(wave) - 1 / 0.9) < 0.01 or abs(len(a) / len(wave) - 1 / 1.1) < 0.01
    noisy = WaveAugment(16000, noise_snr_db=[10, 10], noise_share=1.0)(wave, (5,))
    snr = 10 * np.log10(np.mean(wave**2) / np.mean((noisy - wave) ** 2))
    assert snr == pytest.approx(10, abs=0.1)
    assert WaveAugment(16000)(wave, (0,)) is wave


def test_batches_replay():
    """The same epoch gives the same batches, augmentation included; evaluation is clean and complete."""
    data = create_data(
        "tones", train_size=40, val_size=7, test_size=7, noise_snr_db=[5, 10], speeds=[0.9, 1.0]
    )
    loader = data.train_dataloader()
    first, again = list(loader), list(loader)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    loader.set_epoch(1)
    assert not all(torch.equal(a["audio"], b["audio"]) for a, b in zip(first, loader, strict=True))
    indices = [int(i) for b in data.val_dataloader() for i in b["index"]]
    assert sorted(indices) == list(range(7))


@pytest.mark.parametrize("speeds", [[1.0], [0.8, 1.25]])
def test_batch_seconds_set_batch_sizes(speeds):
    data = create_data("tones", batch_s=4.0, duration_buckets=3, speeds=speeds)
    _, sizes = data.buckets()
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    for batch in data.train_dataloader():
        assert batch["audio"].numel() / 8000 <= 4.0


# ------------------------------------------------------------------------------------------- synthesis


def test_a_cut_corpus_is_named(tmp_path, monkeypatch):
    """Fewer samples than the index says: without a look at the length the last utterances would be short or empty."""
    data = create_data("espeak", train_size=1, val_size=1, test_size=1)
    samples, index = tmp_path / "a.npy", tmp_path / "a.json"
    monkeypatch.setattr(data, "fetch", lambda: None)
    monkeypatch.setattr(data, "_paths", lambda: (samples, index, "a"))
    np.save(samples, np.zeros(90, dtype=np.int16))
    index.write_text(json.dumps({"ends": [30, 60, 100], "sha256": "0", "rows": []}))
    with pytest.raises(DataError, match="a.npy is damaged .90 samples, 100 expected.; delete it"):
        data.utterances()


@pytest.mark.network
def test_espeak_corpus_is_reproducible(tmp_path, monkeypatch):
    """A corpus rendered twice is the same; test voices and sentences are nowhere else; word times are in order."""
    from data import carriers
    from data.speech_render import Line, render

    try:
        carriers.fetch("espeak")
    except DataError as error:
        pytest.skip(f"the synthesiser could not be fetched: {error}")
    if carriers.cached("espeak") is None:
        pytest.skip("no synthesiser for this platform")
    sizes = {"train_size": 20, "val_size": 4, "test_size": 12}
    data = create_data("espeak", **sizes)
    data.setup()
    lines = [line for s in ("train", "val", "test") for _, line in data.lines()[s]]
    again = render(lines, sample_rate=16000, processes=1)
    found = [u for s in ("train", "val", "test") for u in data.split(s)]
    for utterance, spoken in zip(found, again, strict=True):
        assert np.array_equal(data.samples(utterance), spoken.samples.astype(np.float32) / 32768)
        starts = utterance.word_starts_s
        assert len(starts) == len(utterance.text.split()) and list(starts) == sorted(starts)
        assert starts[-1] < utterance.duration_s
    voices = {s: {u.speaker.split("+")[1] for u in data.split(s)} for s in ("train", "val", "test")}
    texts = {s: {u.text for u in data.split(s)} for s in ("train", "val", "test")}
    assert not voices["test"] & (voices["train"] | voices["val"])
    assert not texts["train"] & (texts["val"] | texts["test"])
    with pytest.raises(DataError, match="no-such-voice"):
        render([Line("hello", "no-such-voice")])


# ------------------------------------------------------------------------------------------- real prompts


def prompt_tree(root):
    import gzip

    from data.asterisk import SOUNDS, TEXTS

    (root / SOUNDS / "digits").mkdir(parents=True)
    (root / TEXTS).parent.mkdir(parents=True)
    lines = ["; comment", "beep: [a beep]", "gone: No such file here.", "digits/1: one"]
    for i in range(12):
        name = f"digits/p{i}" if i % 2 else f"p{i}"
        soundfile.write(root / SOUNDS / f"{name}.wav", beep(0.6, 8000), 8000)
        lines.append(f"{name}: Please press {'abcdefghijkl'[i]}, then wait.")
    soundfile.write(root / SOUNDS / "press2.wav", beep(0.6, 8000), 8000)
    lines.append("press2: Press 2 now.")
    with gzip.open(root / TEXTS, "wt") as out:
        out.write("\n".join(lines))


def test_asterisk_prompts(tmp_path):
    """Prompts of two or more words with recordings; digits cannot be written with letters and are named."""
    prompt_tree(tmp_path)
    data = create_data("asterisk", root=str(tmp_path), train_size=6, val_size=2)
    data.setup()
    assert sum(data.split_record()["sizes"].values()) == 12
    assert list(data.skipped) == ["press2"] and "'2'" in data.skipped["press2"]
    texts = [{u.text for u in data.split(s)} for s in ("train", "val", "test")]
    assert not texts[0] & texts[2] and "please press a then wait" in texts[0] | texts[1] | texts[2]
    with pytest.raises(DataError, match="install the Debian packages"):
        create_data("asterisk", root=str(tmp_path / "digits")).setup()
