"""What is exported of a model, task by task.

A model is one program, speech is two (`encoder` and `decoder`). Inputs are what the task's predictor makes of raw input,
so the card's preprocessing says how to prepare them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import WeightsError
from zoo.layers.row_bank import RowBank
from zoo.programs.audio import ConvolvedLogMel
from zoo.programs.parts import BATCH, LENGTH, Call, Inputs, Part


def parts_of(model: nn.Module, card: dict[str, Any]) -> list[Part]:
    """The programs of a model in evaluation mode.

    Raises:
        WeightsError: The task has no exported form.
    """
    make = _FORMS.get(card["task"]) or _FORMS.get(card.get("kind", ""))
    if make is None:
        raise WeightsError(
            f"task {card['task']!r} has no exported form; tasks that do: {', '.join(sorted(_FORMS))}"
        )
    return make(model.eval(), card["preprocessing"])


def _classifier(model: nn.Module, p: dict[str, Any]) -> list[Part]:
    draw = lambda batch, _: {"images": torch.randn(batch, p["channels"], *p["size"])}
    return [Part("", model, draw, ("logits",), {"images": {0: BATCH}})]


def _detector(model: nn.Module, p: dict[str, Any]) -> list[Part]:
    def draw(batch: int, _: int) -> Inputs:
        # Without padding, and with some at the right and below.
        size = torch.tensor([p["size"], [max(1, 3 * s // 4) for s in p["size"]]]).repeat(batch, 1)[:batch]
        return {"images": torch.randn(batch, p["channels"], *p["size"]), "size": size}

    def last_layer(model: nn.Module, images: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        out = model(images, size)
        return out["logits"][-1], out["boxes"][-1]

    return [
        Part(
            "",
            Call(model, last_layer),
            draw,
            ("logits", "boxes"),
            {"images": {0: BATCH}, "size": {0: BATCH}},
            notes="size: height and width of each picture without padding; boxes: centre, width and height over that size",
        )
    ]


def _speech(model: nn.Module, p: dict[str, Any]) -> list[Part]:
    samples = round(p.get("chunk_s", p["max_s"]) * p["sample_rate"])

    def sounds(batch: int, length: int) -> Inputs:
        used = torch.linspace(length, 0.7 * length, batch).long()
        return {"audio": 0.1 * torch.randn(batch, length), "lengths": used}

    def encode(model: nn.Module, audio: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        memory, places = model.encode(audio, lengths)
        return memory, places, model.ctc_logits(memory)

    model = copy.deepcopy(model)
    model.front = ConvolvedLogMel(model.front)
    free = {"audio": {0: BATCH, 1: LENGTH}, "lengths": {0: BATCH}}
    parts = [
        Part(
            "encoder",
            Call(model, encode),
            sounds,
            ("memory", "places", "ctc_logits"),
            free,
            (samples, samples // 2 + 7),
            "audio: samples at the card's rate, zeros behind each recording's `lengths`; token 0 of ctc_logits is the blank",
        )
    ]
    if model.has_decoder:
        places = int(model.stem.lengths(model.front.frames(torch.tensor(samples))))

        def prefixes(batch: int, length: int) -> Inputs:
            return {
                "tokens": torch.randint(1, model.vocab_size, (batch, length)),
                "memory": torch.randn(batch, places, model.dim),
                "places": torch.linspace(places, max(1, places // 2), batch).long(),
            }

        parts.append(
            Part(
                "decoder",
                Call(model, lambda m, tokens, memory, places: m.decode(tokens, memory, places)),
                prefixes,
                ("logits",),
                {
                    "tokens": {0: BATCH, 1: LENGTH},
                    "memory": {0: BATCH, 1: "memory_length"},
                    "places": {0: BATCH},
                },
                (12, 5),
                "tokens: the sentence so far, from token 1 on; the last row of logits is for the next token, 2 ends",
            )
        )
    return parts


def _forecaster(model: nn.Module, p: dict[str, Any]) -> list[Part]:
    sensors, past, future, lags = (
        len(p["sensors"]),
        p["history_steps"],
        p["horizon_steps"],
        len(p["lag_steps"]),
    )
    week = round(7 * 24 * 60 / p["step_minutes"])

    def draw(batch: int, _: int) -> Inputs:
        found = {
            "history": 50 * torch.rand(batch, past, sensors),
            "history_seen": torch.rand(batch, past, sensors) > 0.1,
            "clock": torch.randint(week, (batch,)),
        }
        if lags:
            found["known"] = 50 * torch.rand(batch, lags, future, sensors)
            found["known_seen"] = torch.rand(batch, lags, future, sensors) > 0.1
        for name in ("history", "known"):
            if name in found:
                found[name] = found[name].masked_fill(~found[f"{name}_seen"], 0.0)
        return found

    axes = {name: {0: BATCH} for name in draw(1, 0)}
    return [
        Part(
            "",
            model,
            draw,
            ("forecast",),
            axes,
            notes="readings are 0 where not seen; clock: slot of the week",
        )
    ]


def _table(model: nn.Module, p: dict[str, Any]) -> list[Part]:
    from zoo.tabular.preprocess import Preprocessor

    columns = Preprocessor.from_dict({k: v for k, v in p.items() if k not in ("kind", "features")})
    numbers, words = len(columns.schema.numerical), columns.cardinalities

    # How many training rows a prediction looks at is data to a trace; here they are given, embedded once.
    model = copy.deepcopy(model)
    for network in model.modules():
        if isinstance(getattr(network, "bank", None), RowBank):
            with torch.no_grad():
                given = network.banked()
            network.banked = lambda bank=given: bank

    def draw(batch: int, _: int) -> Inputs:
        codes = [torch.randint(count, (batch,)) for count in words]
        missing = torch.rand(batch, numbers) > 0.8
        return {
            "numerical": torch.randn(batch, numbers).masked_fill(missing, 0.0),
            "categorical": torch.stack(codes, 1) if codes else torch.zeros(batch, 0, dtype=torch.long),
            "missing": missing,
        }

    names = ("numerical", "categorical", "missing")
    return [Part("", model, draw, ("outputs",), {n: {0: BATCH} for n in names})]


def _recommender(model: nn.Module, p: dict[str, Any]) -> list[Part]:
    def draw(batch: int, length: int) -> Inputs:
        items = torch.randint(1, model.num_items + 1, (batch, length))
        if batch > 1:
            items[1:, : length // 2] = 0
        return {"items": items, "times": -torch.arange(length, 0, -1.0).expand(batch, length).contiguous()}

    def score(model: nn.Module, items: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        user = model.user_vector(items, times)
        return user, model.scores(user)

    names = ("items", "times")
    return [
        Part(
            "",
            Call(model, score),
            lambda batch, _: draw(batch, model.max_length),
            ("user", "scores"),
            {n: {0: BATCH} for n in names},
            notes="items: numbers from 1 in the order of the catalogue, zeros on the left; column i of scores is item i + 1",
        )
    ]


def _click(model: nn.Module, p: dict[str, Any]) -> list[Part]:
    category = torch.tensor(p["category"])

    def draw(batch: int, _: int) -> Inputs:
        item = torch.randint(1, len(category), (batch,))
        items = torch.randint(1, len(category), (batch, p["max_length"]))
        items[:, : p["max_length"] // 3] = 0
        return {
            "item": item,
            "category": category[item],
            "items": items,
            "categories": category[items],
        }

    function = lambda m, *inputs: m(*inputs)["logit"].sigmoid()
    axes = {name: {0: BATCH} for name in ("item", "category", "items", "categories")}
    return [Part("", Call(model, function), draw, ("probability",), axes)]


def _solver(model: nn.Module, p: dict[str, Any]) -> list[Part]:
    lower, upper = torch.tensor(p["lower"]), torch.tensor(p["upper"])
    dtype = next(model.parameters()).dtype
    draw = lambda batch, _: {"points": (lower + (upper - lower) * torch.rand(batch, len(lower))).to(dtype)}
    return [Part("", model, draw, ("fields",), {"points": {0: BATCH}})]


def _operator(model: nn.Module, p: dict[str, Any]) -> list[Part]:
    def draw(batch: int, _: int) -> Inputs:
        x = torch.arange(p["nodes"]) / p["nodes"]
        waves = torch.stack([torch.sin(2 * torch.pi * (k + 1) * x) for k in range(4)])
        return {"values": torch.randn(batch, 4) @ waves}

    def apply(model: nn.Module, values: Tensor) -> Tensor:
        n = values.shape[1]
        return model(values, torch.arange(n, dtype=values.dtype, device=values.device) / n)

    notes = "values: of the function at equally spaced nodes of [0, 1)"
    return [Part("", Call(model, apply), draw, ("result",), {"values": {0: BATCH}}, notes=notes)]


def _recall(model: nn.Module, p: dict[str, Any]) -> list[Part]:
    draw = lambda batch, _: {"tokens": torch.randint(p["vocabulary"], (batch, p["length"]))}
    return [Part("", model, draw, ("logits",), {"tokens": {0: BATCH}})]


def _effects(model: nn.Module, p: dict[str, Any]) -> list[Part]:
    draw = lambda batch, _: {"covariates": torch.randn(batch, len(p["mean"]))}

    def outcomes(model: nn.Module, covariates: Tensor) -> tuple[Tensor, Tensor]:
        context = model.encode(covariates)
        none = torch.zeros_like(covariates[:, 0], dtype=torch.long)
        return tuple(model.outcome(context, none + t) * p["outcome_std"] + p["outcome_mean"] for t in (0, 1))

    notes = "covariates: standardised with the card's mean and std"
    return [
        Part(
            "", Call(model, outcomes), draw, ("untreated", "treated"), {"covariates": {0: BATCH}}, notes=notes
        )
    ]


_FORMS = {
    "vit": _classifier,
    "detr": _detector,
    "segmentation": _classifier,
    "asr": _speech,
    "traffic": _forecaster,
    "tabular": _table,
    "tabular_multitask": _table,
    "recommendation": _recommender,
    "ctr": _click,
    "pinn": _solver,
    "operator": _operator,
    "mqar": _recall,
    "treatment_effect": _effects,
}
