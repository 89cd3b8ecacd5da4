"""Figures of the traffic task: forecast against truth, error by hour and step, attention over the map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.sampler import BatchKey
from zoo.attention.base import Attention

MAX_SENSORS = 12


def draw(
    folder: Path,
    model: nn.Module,
    data: Any,
    starts: np.ndarray,
    forecast: np.ndarray,
    target: np.ndarray,
    seen: np.ndarray,
) -> list[Path]:
    """Write the figures of a tested model.

    Args:
        folder: Where to.
        model: The network.
        data: Its data module.
        starts: First rows of the test windows, [S], ascending.
        forecast: Their forecasts, [S, Q, N].
        target: [S, Q, N].
        seen: bool [S, Q, N].
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        _forecasts(folder / "forecast.png", data, starts, forecast, target, seen),
        _error_by_hour(folder / "error_by_hour.png", data, starts, forecast, target, seen),
    ]
    if data.series.coordinates is not None:
        written.append(_error_map(folder / "error_map.png", data, forecast, target, seen))
        path = _attention_map(folder / "attention_map.png", model, data)
        written += [path] if path else []
    return written


def _figure(*size: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _forecasts(
    path: Path, data: Any, starts: np.ndarray, forecast: np.ndarray, target: np.ndarray, seen: np.ndarray
) -> Path:
    """Two weeks of the busiest sensors: truth, first step and last step ahead at the time they are for."""
    series, g = data.series, data.geometry
    span = min(len(forecast), 14 * series.slots_per_day)
    first = (len(forecast) - span) // 2
    mean = np.where(seen, target, np.nan)
    order = np.argsort(-np.nanmean(mean, axis=(0, 1)))[:MAX_SENSORS]
    rows = -(-len(order) // 2)
    figure = _figure(14, 2.2 * rows)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True)
    window = slice(first, first + span)
    for axis, sensor in zip(axes.flat, order, strict=False):
        for step, style in ((0, "C0"), (g.horizon - 1, "C1")):
            times = series.times[starts[window] + g.history + step]
            label = f"forecast {(step + 1) * series.step_minutes:g} min ahead"
            axis.plot(times, forecast[window, step, sensor], style, lw=0.9, label=label)
        times = series.times[starts[window] + g.history]
        axis.plot(times, np.where(seen, target, np.nan)[window, 0, sensor], "k", lw=0.9, label="truth")
        axis.set_title(series.sensors[sensor], fontsize=8)
        axis.tick_params(labelsize=7)
    axes.flat[0].legend(fontsize=7)
    figure.supylabel(data.unit)
    figure.savefig(path, dpi=110)
    return path


def _errors(forecast: np.ndarray, target: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.where(seen, np.abs(forecast - target), np.nan)


def _error_by_hour(
    path: Path, data: Any, starts: np.ndarray, forecast: np.ndarray, target: np.ndarray, seen: np.ndarray
) -> Path:
    """Mean absolute error by hour of the forecast time, and by step ahead."""
    series, g = data.series, data.geometry
    error = _errors(forecast, target, seen)
    figure = _figure(11, 4)
    left, right = figure.subplots(1, 2)
    for step in data.report_steps:
        hour = (
            series.week_slot[starts + g.history + step - 1] % series.slots_per_day * series.step_minutes // 60
        )
        means = [_mean(error[hour == h, step - 1]) for h in range(24)]
        left.plot(range(24), means, marker=".", label=f"{step} steps ahead")
    left.set(xlabel="hour of the day that is forecast", ylabel=f"mean absolute error, {data.unit}")
    left.legend(fontsize=8)
    right.plot(range(1, g.horizon + 1), [_mean(error[:, q]) for q in range(g.horizon)], marker="o")
    right.set(xlabel="steps ahead", ylabel=f"mean absolute error, {data.unit}", ylim=(0, None))
    figure.savefig(path, dpi=110)
    return path


def _mean(cells: np.ndarray) -> float:
    return float(np.nanmean(cells)) if np.isfinite(cells).any() else float("nan")


def _error_map(path: Path, data: Any, forecast: np.ndarray, target: np.ndarray, seen: np.ndarray) -> Path:
    """Relative error of each sensor at its place: sum of absolute errors over sum of readings."""
    error = np.nansum(_errors(forecast, target, seen), axis=(0, 1))
    total = np.where(seen, np.abs(target), 0.0).sum(axis=(0, 1))
    places = data.series.coordinates
    figure = _figure(7, 6)
    axes = figure.subplots()
    dots = axes.scatter(places[:, 1], places[:, 0], c=error / np.maximum(total, 1e-9), s=80, cmap="viridis")
    figure.colorbar(dots, label="sum of absolute errors / sum of readings")
    axes.set(xlabel="longitude", ylabel="latitude", title="Relative error by sensor, test split")
    axes.ticklabel_format(useOffset=False)
    figure.savefig(path, dpi=110)
    return path


@torch.no_grad()
def _attention_map(path: Path, model: nn.Module, data: Any) -> Path | None:
    """Mean attention between sensors over a week of test windows; None where the variant has no map."""
    from tasks.traffic import INPUTS

    maps: list[torch.Tensor] = []
    sensors = len(data.series.sensors)

    def keep(module: Attention, inputs: tuple, keywords: dict) -> None:
        if inputs[0].shape[1] == sensors and not module.pattern.cross:
            weights = module.attention_map(*inputs, **keywords)
            maps.append(weights.mean(dim=(0, 1)).cpu())

    handles = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, Attention) and "spatial" in name and module.capabilities.has_map
    ]
    if not handles or sensors > 400:
        return None
    count = min(len(data.starts["test"]), 7 * data.series.slots_per_day)
    batch = data.dataset("test")[
        BatchKey(np.linspace(0, len(data.starts["test"]) - 1, count).astype(int), -1, 0)
    ]
    device = next(model.parameters()).device
    model.eval()
    try:
        for part in range(0, count, 64):
            model(**{k: batch[k][part : part + 64].to(device) for k in INPUTS if k in batch})
    finally:
        for handle in handles:
            handle.remove()
    if not maps:
        return None
    weights = torch.stack(maps).mean(0)
    weights.fill_diagonal_(0.0)
    places = data.series.coordinates
    figure = _figure(7, 6)
    axes = figure.subplots()
    strongest = weights.abs().flatten().topk(min(4 * sensors, sensors * (sensors - 1))).indices
    top = float(weights.abs().max()) or 1.0
    for edge in strongest.tolist():
        i, j = divmod(edge, sensors)
        share = float(weights[i, j].abs()) / top
        ends = (places[j, 1], places[j, 0]), (places[i, 1], places[i, 0])
        arrow = {"arrowstyle": "-|>", "alpha": share, "lw": 2 * share, "color": "C3"}
        axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops=arrow)
    received = weights.abs().sum(0).numpy()
    axes.scatter(
        places[:, 1], places[:, 0], s=20 + 100 * received / max(received.max(), 1e-9), color="C0", zorder=3
    )
    axes.set(
        xlabel="longitude",
        ylabel="latitude",
        title="Attention between sensors, test split: arrows to the listener,\ndots by attention received",
    )
    axes.ticklabel_format(useOffset=False)
    figure.savefig(path, dpi=110)
    return path
