"""attention-zoo: one attention interface, every attention mechanism, six application domains.

Importing this package needs torch alone; variants, models and weights load when they are asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "create_attention": "zoo.attention.registry",
    "get_attention": "zoo.attention.registry",
    "list_attention": "zoo.attention.registry",
    "create_model": "zoo.models",
    "list_models": "zoo.models",
    "load": "zoo.pretrained",
    "convert": "zoo.conversion",
    "from_timm": "zoo.pretrained.from_timm",
    "export": "zoo.programs",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
