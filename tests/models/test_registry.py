"""Names, sizes, options and third-party models."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.attention.base import Pattern
from zoo.attention.slots import Slot
from zoo.errors import ConfigError
from zoo.models import (
    build_model,
    create_model,
    get_model,
    list_models,
    model_slots,
    registry,
)

CONFIGS = Path(__file__).parents[2] / "conf" / "model"


def test_listing_imports_no_model():
    code = (
        "import sys, zoo.models as m; names = m.list_models(); assert 'vit' in names, names; "
        "print([n for n in names if f'zoo.models.{n}' in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_sizes_are_listed_and_built():
    assert {"vit_micro", "vit_tiny", "vit_small", "vit_base"} <= set(list_models("vit_*", sizes=True))
    assert isinstance(create_model("vit_micro"), get_model("vit"))
    assert get_model("vit_tiny") is get_model("vit")


@pytest.mark.parametrize("name", list_models())
def test_model_keeps_the_contract(name):
    cls = get_model(name)
    assert issubclass(cls, nn.Module)
    assert cls.name == name
    slots = model_slots(name)
    assert all(isinstance(s, Slot) for s in slots.values())
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    assert parameters[0].name == "attention"
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters[1:])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_yaml_lists_every_option_with_its_default(path):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    config = yaml.safe_load(path.read_text())
    name = config.pop("name")
    assert name == path.stem
    defaults = registry.model_options(name)
    assert config == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("vitt"), "did you mean .*'vit'"),
        (lambda: create_model("vit_mikro"), "did you mean 'micro'"),
        (lambda: create_model("vit", depht=3), "did you mean 'depth'"),
        (lambda: create_model("vit_tiny", size="small"), "already names a size"),
        (lambda: create_model("vit", attention="softmx"), "did you mean 'softmax'"),
        (lambda: create_model("vit", attention={"kernel": 3}), "names no variant"),
        (lambda: create_model("vit", slots={"encodr": "softmax"}), "did you mean 'encoder'"),
        (lambda: create_model("vit", pretrained=True), "pretrained=PATH_OR_NAME"),
        (lambda: build_model("vit", {}), "slot encoder"),
    ],
)
def test_errors_name_the_way_out(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_pretrained_is_handed_to_the_weight_loader(monkeypatch):
    pretrained = pytest.importorskip("zoo.pretrained", reason="zoo.pretrained is not there")
    calls = []
    monkeypatch.setattr(
        pretrained, "load_weights", lambda model, path: calls.append((model, path)), raising=False
    )
    model = create_model("vit_micro", pretrained="some/path")
    assert calls == [(model, "some/path")]


class Third(nn.Module):
    sizes = {"big": {"dim": 8}}  # noqa: RUF012

    def __init__(self, attention, *, size="big"):
        super().__init__()
        self.attn = attention["reader"](self.sizes[size]["dim"], 2)

    @classmethod
    def slots(cls, **options):
        return {"reader": Slot(Pattern.CAUSAL_SELF)}


class Fourth(Third):
    def __init__(self, attention, *, depth=3, **options):
        super().__init__(attention, **options)


def test_options_of_a_subclass_include_its_parents(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {**registry._registered, "fourth": Fourth})
    assert registry.model_options("fourth") == {"depth": 3, "size": "big"}
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        create_model("fourth", dpth=2)


def test_third_party_models_join_by_entry_point(monkeypatch):
    class Point:
        name = "third"

        def load(self):
            return Third

    monkeypatch.setattr(registry, "_third_party", lambda: {"third": Point()})
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    assert "third_big" in list_models(sizes=True)
    model = create_model("third_big")
    assert model.attn.pattern is Pattern.CAUSAL_SELF
    assert model.attn(torch.randn(1, 3, 8)).shape == (1, 3, 8)


def test_a_class_without_slots_is_refused():
    with pytest.raises(TypeError, match="slots"):
        registry.register_model(nn.Linear)
