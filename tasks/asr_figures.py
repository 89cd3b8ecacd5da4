"""Pictures and texts that users of speech recognition look at.

What buckets save on a log-normal sample of lengths, without any corpus:

    python -m tasks.asr_figures padding --out docs/figures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.speech_baselines import edit_distance
from data.speech_bucketing import BucketSampler, make_buckets, padding_ratio

if TYPE_CHECKING:
    from tasks.asr import SpeechToText
    from tasks.asr_analysis import Picture


def draw(task: SpeechToText, folder: Path) -> list[Path]:
    """Write transcripts.txt (worst first), alignment.png and padding.png; returns the files."""
    rows = sorted(task.examples, key=lambda r: -edit_distance(r[1], r[0]) / max(1, len(r[0])))
    path = folder / "transcripts.txt"
    path.write_text("".join(f"reference  {r}\ndecoder    {h}\nctc        {c}\n\n" for r, h, c in rows))
    written = [path]
    if task.picture is not None:
        written.append(draw_alignment(task.picture, task.data.tokeniser.pieces, folder / "alignment.png"))
    if task.data.duration_buckets:
        written.append(draw_padding(task, folder / "padding.png"))
    return written


def draw_alignment(picture: Picture, pieces: list[str], path: Path) -> Path:
    """Features, CTC posteriors and cross-attention of one sentence over time, with word starts."""
    from matplotlib.figure import Figure

    rows = 2 if picture.attention is None else 3
    figure = Figure(figsize=(10, 2.6 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    seconds = picture.seconds
    axes[0].imshow(
        picture.features.T, origin="lower", aspect="auto", extent=(0, seconds, 0, picture.features.shape[1])
    )
    axes[0].set(title=picture.text, ylabel="mel band")
    times = (np.arange(len(picture.posteriors)) + 0.5) * seconds / len(picture.posteriors)
    best = picture.posteriors.argmax(1)
    axes[1].plot(times, picture.posteriors[:, 0], color="0.8", label="blank")
    for token in sorted(set(best.tolist()) - {0}):
        axes[1].plot(times, picture.posteriors[:, token], lw=1)
        peak = int(picture.posteriors[:, token].argmax())
        axes[1].annotate(
            pieces[token].strip() or "_", (times[peak], picture.posteriors[peak, token]), ha="center"
        )
    axes[1].set(ylabel="CTC posterior", ylim=(0, 1.15))
    if picture.attention is not None:
        extent = (0, seconds, len(picture.attention), 0)
        if picture.attention.min() < 0:  # signed maps: zero is white
            top = float(np.abs(picture.attention).max())
            axes[2].imshow(
                picture.attention, aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top, extent=extent
            )
        else:
            axes[2].imshow(picture.attention, aspect="auto", cmap="magma", extent=extent)
        axes[2].set(ylabel="output token")
    styles = (
        ("truth", picture.truth_s, "w", "-"),
        ("CTC", picture.ctc_s, "c", "--"),
        ("DTW", picture.dtw_s, "lime", ":"),
    )
    for name, starts, colour, style in styles:
        for i, t in enumerate(starts):
            for a in (axes[0], axes[-1]) if rows == 3 else (axes[0],):
                a.axvline(t, color=colour, ls=style, lw=1.2, label=name if i == 0 and a is axes[0] else None)
    axes[0].legend(loc="upper right", fontsize=8, facecolor="0.3", labelcolor="w")
    axes[-1].set(xlabel="s", xlim=(0, seconds))
    figure.savefig(path, dpi=130)
    return path


def padding_table(task: SpeechToText) -> dict[str, dict[str, float]]:
    """Padding ratio of frames and tokens, in random batches and in buckets, over one epoch."""
    data = task.data
    lengths = {
        "frames": data.durations("train"),
        "tokens": np.array([len(t) for t in data.token_lists("train")]),
    }
    order = np.random.default_rng(0).permutation(len(lengths["frames"]))
    random = np.split(order, range(data.batch_size, len(order), data.batch_size))
    bucketed = data.loader("train", shuffle=True).sampler.batches()
    return {
        name: {"random": padding_ratio(values, random), "buckets": padding_ratio(values, bucketed)}
        for name, values in lengths.items()
    }


def draw_padding(task: SpeechToText, path: Path) -> Path:
    """Histogram of durations with the buckets' edges, and what the buckets save."""
    from matplotlib.figure import Figure

    table = padding_table(task)
    buckets, _ = task.data.buckets()
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(task.data.durations("train"), bins=60, color="0.6")
    for bucket in buckets:
        left.axvline(bucket.max_duration_s, color="C3", lw=1)
    left.set(xlabel="duration, s", ylabel="training utterances", title="bucket edges")
    for shift, kind, colour in ((-0.2, "random", "0.6"), (0.2, "buckets", "C3")):
        shares = [ratios[kind] for ratios in table.values()]
        bars = right.bar(np.arange(len(table)) + shift, shares, 0.38, color=colour, label=kind)
        right.bar_label(bars, fmt="{:.1%}")
    right.set_xticks(range(len(table)), list(table))
    right.set(title="padding by kind of batch", ylabel="share of padding")
    right.margins(y=0.15)
    right.legend()
    figure.savefig(path, dpi=130)
    return path


def log_normal_sample(count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and tokens of `count` utterances: the median lasts 4.5 s, and 14 tokens a second vary by a fifth."""
    rng = np.random.default_rng(0)
    durations = np.clip(rng.lognormal(1.5, 0.7, count), 0.5, 40)
    return durations, np.maximum(1, (durations * 14 * rng.uniform(0.8, 1.2, count)).astype(int))


def padding_of_sample(batch_size: int = 32) -> dict[str, dict[str, float]]:
    """Padding ratio of seconds and tokens of the log-normal sample, by kind of batch."""
    durations, tokens = log_normal_sample()

    def bucketed(token_buckets: int) -> list[np.ndarray]:
        found = make_buckets(durations, tokens, buckets=30, token_buckets=token_buckets)
        return BucketSampler(found, [batch_size] * len(found)).batches()

    def cut(order: np.ndarray) -> list[np.ndarray]:
        return np.split(order, range(batch_size, len(order), batch_size))

    kinds = {
        "random": cut(np.random.default_rng(1).permutation(len(durations))),
        "sorted": cut(np.argsort(durations, kind="stable")),
        "30 buckets": bucketed(1),
        "30 x 2 buckets": bucketed(2),
    }
    return {
        kind: {"seconds": padding_ratio(durations, batches), "tokens": padding_ratio(tokens, batches)}
        for kind, batches in kinds.items()
    }


def draw_padding_of_sample(path: Path) -> dict[str, dict[str, float]]:
    """The sample's lengths, and its padding in random, sorted and bucketed batches of 32; returns the ratios."""
    from matplotlib.figure import Figure

    durations, tokens = log_normal_sample()
    ratios = padding_of_sample()
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(durations, bins=60, color="0.6")
    for bucket in make_buckets(durations, tokens, buckets=30):
        left.axvline(bucket.max_duration_s, color="C3", lw=0.5)
    left.set(xlabel="duration, s", ylabel="utterances", title="log-normal lengths, edges of 30 buckets")
    for shift, what, colour in ((-0.2, "seconds", "C3"), (0.2, "tokens", "0.6")):
        shares = [ratio[what] for ratio in ratios.values()]
        bars = right.bar(np.arange(len(ratios)) + shift, shares, 0.38, color=colour, label=what)
        right.bar_label(bars, fmt="{:.1%}", fontsize=8)
    right.axhline(0.1, color="k", ls=":", lw=1)
    right.set_xticks(range(len(ratios)), list(ratios), fontsize=8)
    right.set(title="padding by kind of batch", ylabel="share of padding")
    right.margins(y=0.15)
    right.legend()
    figure.savefig(path, dpi=100)
    return ratios


def main(argv: list[str]) -> int:
    """Draw what was asked for, and print its numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.asr_figures", description="Figures that need no run."
    )
    parser.add_argument("figure", choices=["padding"], help="random, sorted and bucketed batches compared")
    parser.add_argument("--out", type=Path, default=Path(), help="folder (default: here)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    ratios = draw_padding_of_sample(args.out / "speech_padding.png")
    for kind, ratio in ratios.items():
        print(f"{kind:16}" + "".join(f"{what} {share:6.1%}   " for what, share in ratio.items()).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
