"""Weights on disk: a safetensors file and a JSON card of the same stem. Nothing is unpickled, ever.

The card says how to rebuild the model, how to prepare its input, what it was trained on and how good it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory
from zoo.conversion import swap
from zoo.errors import CapabilityError, ConfigError, WeightsError, closest
from zoo.files import write_whole
from zoo.models.registry import build_model, get_model, split_name
from zoo.pretrained.hub import PREFIX, fetch_from_hub
from zoo.pretrained.storage import decode

FORMAT = 1
# A name such as vit_micro_mala.mnist has a dot too; these say that a file is meant.
FILE_SUFFIXES = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".npz", ".h5", ".onnx"}


def card_path(weights: Path) -> Path:
    return weights.with_suffix(".json")


def save_weights(path: Path, model: nn.Module, card: dict[str, Any]) -> None:
    """Write `path` (.safetensors) and its card; each appears whole or not at all."""
    save_tensors(path, {k: v.detach().cpu() for k, v in model.state_dict().items()}, card)


def save_tensors(path: Path, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """`save_weights` for tensors at hand."""
    tensors = {k: v.contiguous().clone() for k, v in tensors.items()}
    write_whole(path, lambda p: save_file(tensors, p, metadata={"format": "pt"}))
    card = {"format": FORMAT, "sha256": sha256(path), "bytes": path.stat().st_size, **card}
    write_whole(card_path(path), lambda p: p.write_text(json.dumps(card, indent=2, default=str) + "\n"))


def update_card(path: Path, **changes: Any) -> None:
    """Change entries of the card beside weights `path`."""
    card = {**read_card(path), **changes}
    write_whole(card_path(path), lambda p: p.write_text(json.dumps(card, indent=2, default=str) + "\n"))


def read_card(path: Path) -> dict[str, Any]:
    """The card beside weights `path`.

    Raises:
        WeightsError: Missing or malformed card, or weights that are not the ones it describes.
    """
    file = card_path(path)
    try:
        card = json.loads(file.read_text())
    except FileNotFoundError:
        raise WeightsError(
            f"{path} has no card ({file.name} beside it); weights of this zoo are a .safetensors and a .json file"
        ) from None
    except (ValueError, OSError) as error:
        raise WeightsError(f"cannot read the card {file}: {error}") from None
    if not isinstance(card, dict) or "model" not in card or card.get("format") != FORMAT:
        raise WeightsError(f"{file} is not a card of this zoo (format {FORMAT} wanted)")
    return card


def read_tensors(path: Path, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        WeightsError: Missing, corrupt or foreign file, or a hash that is not the expected one.
    """
    _refuse_foreign(path)
    if not path.exists():
        raise WeightsError(f"no weights at {path}")
    if expected_sha256 is not None and sha256(path) != expected_sha256:
        raise WeightsError(
            f"{path} is not the file that its card describes (SHA-256 differs); fetch or save it again"
        )
    try:
        return decode(load_file(path))
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file: {error}") from None


def _refuse_foreign(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"{path} is not a .safetensors file; files of other kinds can run code when they are read and are refused. "
            "Convert it where you trust it: safetensors.torch.save_file(state_dict, 'weights.safetensors')"
        )


@dataclass
class LoadReport:
    """What loading did: names missing from the file, unknown to the model, of another shape, or brought to the model's."""

    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded"]
        for name in ("missing", "unexpected", "mismatched", "reshaped"):
            items = getattr(self, name)
            if items:
                parts.append(f"{len(items)} {name}: {', '.join(items[:6])}{' ...' if len(items) > 6 else ''}")
        return "; ".join(parts)


def load_weights(model: nn.Module, path: str | Path, *, strict: bool | str = True) -> LoadReport:
    """Load a weights file into a model.

    Args:
        model: Receives the tensors; a model with `adapt_state_dict(tensors) -> tensors` may rename or resize first.
        path: .safetensors file or a run folder.
        strict: Refuse anything missing, unexpected or of another shape; "names": tensors of another shape stay as the
            model has them; False: take what fits.
    """
    path = resolve(path)
    expected = read_card(path).get("sha256") if card_path(path).exists() else None
    tensors = read_tensors(path, expected)
    stored = {k: v.shape for k, v in tensors.items()}
    if hasattr(model, "adapt_state_dict"):
        tensors = model.adapt_state_dict(tensors)
    own = model.state_dict()
    report = LoadReport(
        missing=sorted(own.keys() - tensors.keys()), unexpected=sorted(tensors.keys() - own.keys())
    )
    report.mismatched = sorted(
        f"{k} {list(tensors[k].shape)} -> {list(own[k].shape)}"
        for k in own.keys() & tensors.keys()
        if tensors[k].shape != own[k].shape
    )
    report.reshaped = sorted(
        f"{k} {list(stored[k])} -> {list(v.shape)}"
        for k, v in tensors.items()
        if stored.get(k, v.shape) != v.shape
    )
    if strict and (report.missing or report.unexpected or (report.mismatched and strict != "names")):
        raise WeightsError(
            f"{path} does not fit {type(model).__name__}: {report}; load with strict=False to take what fits"
        )
    fitting = {k: v for k, v in tensors.items() if k in own and v.shape == own[k].shape}
    if any(k in fitting for k, _ in model.named_parameters()) and all(
        fitting[k].dtype == torch.float64 for k, _ in model.named_parameters() if k in fitting
    ):
        model.double()  # solvers end their training in double precision
    model.load_state_dict(fitting, strict=False)
    report.loaded = len(fitting)
    return report


def resolve(name: str | Path) -> Path:
    """The weights file that `name` stands for: a file, a run folder, a Hub name, or a name in the zoo's folders."""
    if str(name).startswith(PREFIX):
        return fetch_from_hub(str(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return path / "weights.safetensors"
    if path.suffix in FILE_SUFFIXES:
        _refuse_foreign(path)
    if path.suffix in FILE_SUFFIXES or path.exists() or path.parent != Path("."):
        return path
    tried = []
    for folder in (local_folder(), packaged_folder()):
        candidate = folder / f"{name}.safetensors"
        if candidate.exists():
            return candidate
        tried.append(str(candidate))
    near = closest(str(name), list_weights())
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise WeightsError(
        f"no weights named {str(name)!r}; {hint}see: python -m zoo list weights; looked at {', '.join(tried)}"
    )


def list_weights(name: str = "*", *, task: str | None = None, attention: str | None = None) -> list[str]:
    """Names of local and packaged weights that match the shell pattern `name`, and a task and attention if given."""
    folders = (local_folder(), packaged_folder())
    names = sorted({p.stem for folder in folders for p in folder.glob(f"{name}.safetensors")})
    for key, wanted in (("task", task), ("attention", attention)):
        if wanted is not None:
            names = [n for n in names if read_card(resolve(n)).get(key) == wanted]
    return names


def pick_weights(
    model: str, attention: str | Mapping[str, Any] | None, pretrained: str | os.PathLike[str] | bool
) -> tuple[str | os.PathLike[str], dict[str, Any] | None]:
    """Weights that `create_model(model, attention=..., pretrained=...)` means, and their card where there is one.

    Raises:
        ConfigError: pretrained=True where not exactly one file fits.
        WeightsError: Weights of another model.
    """
    stem, preset = split_name(model)
    if pretrained is True:
        wanted = attention if attention is None or isinstance(attention, str) else attention["name"]
        fitting = [n for n in list_weights(attention=wanted) if _is_of(read_card(resolve(n)), stem, preset)]
        if len(fitting) != 1:
            raise ConfigError(
                f"pretrained=True does not say which weights of {model!r}: {', '.join(fitting) or 'none'} fit; "
                "give pretrained=PATH_OR_NAME (see zoo.list_models(pretrained=True)) or hf-hub:owner/name"
            )
        pretrained = fitting[0]
    path = resolve(str(pretrained))
    if not card_path(path).exists():
        return pretrained, None
    card = read_card(path)
    if not _is_of(card, stem, preset):
        size = card["model"]["options"].get("size")
        raise WeightsError(
            f"{path} holds weights of {card['model']['name']!r}{f', size {size}' if size else ''}, not of {model!r}"
        )
    return pretrained, card


def _is_of(card: dict[str, Any], stem: str, preset: dict[str, Any]) -> bool:
    return card["model"]["name"] == stem and preset.items() <= card["model"]["options"].items()


def local_folder() -> Path:
    """Where the user's own named weights lie."""
    root = os.environ.get("ZOO_WEIGHTS")
    return Path(root) if root else Path.home() / ".cache" / "attention-zoo" / "weights"


def packaged_folder() -> Path:
    """Where the weights lie that come with the package."""
    return Path(__file__).parent / "weights"


def build_from_card(card: dict[str, Any]) -> nn.Module:
    """The model that a card describes, with fresh parameters."""
    description, slots = card["model"], get_model(card["model"]["name"]).slots(**card["model"]["options"])
    # In places without order a variant leaves its positions out, unless the run overrode that.
    allow_order = bool(card.get("config", {}).get("attention", {}).get("allow_order"))
    try:
        factories = {
            name: AttentionFactory.from_card(slots[name], chosen, allow_order)
            for name, chosen in card["slots"].items()
        }
    except KeyError as error:
        raise WeightsError(
            f"the card names slot {error}, which model {description['name']!r} does not have"
        ) from None
    try:
        model = build_model(description["name"], attention=factories, **description["options"])
        swap_layers(model, card)
        return model
    except (TypeError, CapabilityError) as error:
        raise WeightsError(f"the card's model cannot be built here: {error}") from None


def swap_layers(model: nn.Module, card: dict[str, Any]) -> None:
    """Put the attention into a fresh model's layers that conversion put into the trained one's."""
    for change in card.get("swapped", []):
        for layer in change["layers"]:
            swap(model, layer, change["attention"], change["options"])


def load_model(name: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Model in evaluation mode and card of saved weights."""
    path = resolve(name)
    card = read_card(path)
    model = build_from_card(card)
    load_weights(model, path)
    return model.eval(), card


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


__all__ = [
    "LoadReport",
    "build_from_card",
    "load_model",
    "load_weights",
    "read_card",
    "resolve",
    "save_weights",
]
