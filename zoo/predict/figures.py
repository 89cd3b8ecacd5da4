"""One picture per prediction: what a person looks at to see whether it makes sense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from zoo.errors import CapabilityError
from zoo.predict import Predictor

Draw = Callable[[Predictor, Any, dict[str, Any], Any], None]


def draw(predictor: Predictor, raw: Any, prediction: dict[str, Any], figure: Any) -> None:
    """Draw a prediction into a matplotlib figure.

    Raises:
        CapabilityError: The task has no picture.
    """
    task = predictor.card["task"]
    function = _DRAW.get(task) or _DRAW.get(predictor.card.get("kind", ""))
    if function is None:
        raise CapabilityError(
            f"predictions of task {task!r} have no figure; tasks that do: {', '.join(_DRAW)}"
        )
    function(predictor, raw, prediction, figure)


def _image(predictor: Predictor, raw: Any, prediction: dict[str, Any], figure: Any) -> None:
    from zoo.predict.images import open_image

    left, right = figure.subplots(1, 2)
    left.imshow(open_image(raw), cmap="gray")
    left.set_axis_off()
    names, values = zip(*reversed(prediction["top"]), strict=True)
    right.barh(names, values)
    right.set(xlim=(0, 1), xlabel="probability")


def _boxes(predictor: Predictor, raw: Any, prediction: dict[str, Any], figure: Any) -> None:
    from matplotlib.patches import Rectangle

    from zoo.predict._scenes import open_image

    axes = figure.subplots()
    axes.imshow(open_image(raw))
    axes.set_axis_off()
    for found in prediction["objects"]:
        x1, y1, x2, y2 = found["box"]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="C1"))
        axes.text(x1, y1, f"{found['label']} {found['score']:.2f}", color="C1", va="bottom", fontsize=7)


def _masks(predictor: Predictor, raw: Any, prediction: dict[str, Any], figure: Any) -> None:
    from zoo.predict._scenes import open_image

    left, right = figure.subplots(1, 2)
    left.imshow(open_image(raw))
    shown = right.imshow(prediction["mask"], cmap="tab20", vmin=0, vmax=max(1, len(predictor.labels) - 1))
    ticks = figure.colorbar(shown, ax=right, ticks=range(len(predictor.labels)))
    ticks.ax.set_yticklabels(predictor.labels)
    for axes in (left, right):
        axes.set_axis_off()


def _sound(predictor: Predictor, raw: Any, prediction: dict[str, Any], figure: Any) -> None:
    wave = predictor.preprocess(raw)[0].numpy()
    axes = figure.subplots()
    axes.plot(np.arange(len(wave)) / predictor.preprocessing["sample_rate"], wave, lw=0.4)
    for word in prediction["words"]:
        axes.axvspan(word["start_s"], word["end_s"], alpha=0.15)
        axes.text(word["start_s"], float(np.abs(wave).max()), word["word"], fontsize=7)
    axes.set(xlabel="seconds", title=prediction["text"] or "(nothing said)")


def _forecast(predictor: Predictor, raw: Any, prediction: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    past = predictor.preprocess(raw)["history"][0].numpy()
    ahead = np.array(prediction["forecast"])
    for i, name in enumerate(prediction["sensors"][:8]):
        axes.plot(range(-len(past) + 1, 1), past[:, i], color=f"C{i}", lw=0.8)
        axes.plot(range(1, len(ahead) + 1), ahead[:, i], color=f"C{i}", ls="--", label=name)
    axes.set(xlabel="steps from the last reading", ylabel=prediction["unit"])
    axes.legend(fontsize=7)


def _table(predictor: Predictor, raw: Any, prediction: dict[str, Any], figure: Any) -> None:
    parts = figure.subplots(1, len(prediction["predictions"]), squeeze=False)[0]
    for axes, (name, values) in zip(parts, prediction["predictions"].items(), strict=True):
        if name in prediction["probability"]:
            axes.bar(*zip(*sorted((str(v), values.count(v)) for v in set(values)), strict=True))
        else:
            axes.hist(values, bins=30)
        axes.set(xlabel=name, ylabel="rows")


def _ranking(predictor: Predictor, raw: Any, prediction: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    names = [title or item for item, title, _ in reversed(prediction["top"])]
    axes.barh(range(len(names)), [score for _, _, score in reversed(prediction["top"])])
    axes.set_yticks(range(len(names)), [name[:30] for name in names], fontsize=7)
    axes.set_xlabel("score")


def _fields(predictor: Predictor, raw: Any, prediction: dict[str, Any], figure: Any) -> None:
    points = predictor.preprocess(raw)
    values = predictor.fields(points)
    names = predictor.about["coordinates"]
    for axes, (field, value) in zip(
        figure.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True
    ):
        if points.shape[1] == 1:
            axes.plot(points[:, 0], value)
        else:
            figure.colorbar(axes.scatter(points[:, 0], points[:, 1], c=value, s=4), ax=axes)
            axes.set_ylabel(names[1])
        axes.set(xlabel=names[0], title=field)


def _functions(predictor: Predictor, raw: Any, prediction: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    given = predictor.preprocess(raw)
    x = np.arange(given.shape[1]) / given.shape[1]
    for i in range(min(4, len(given))):
        axes.plot(x, given[i], color=f"C{i}", lw=0.8, ls=":")
        axes.plot(x, prediction["result"][i], color=f"C{i}")
    axes.set(xlabel="x", title="given (dotted) and result")


def _effects(predictor: Predictor, raw: Any, prediction: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    axes.hist(prediction["effect"], bins=30)
    axes.axvline(prediction["mean_effect"], color="C1", ls="--")
    axes.set(xlabel="effect of treatment", ylabel="rows")


_DRAW: dict[str, Draw] = {
    "vit": _image,
    "detr": _boxes,
    "segmentation": _masks,
    "asr": _sound,
    "traffic": _forecast,
    "tabular": _table,
    "tabular_multitask": _table,
    "recommendation": _ranking,
    "pinn": _fields,
    "operator": _functions,
    "treatment_effect": _effects,
}
