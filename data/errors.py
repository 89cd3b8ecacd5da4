"""The data layer's error, importable without torch."""

from zoo.errors import DataError

__all__ = ["DataError"]
