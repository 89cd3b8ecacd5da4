"""Tables to several predictions per row; the same as `zoo.predict.tabular`."""

from zoo.predict.tabular import TaskPredictor

__all__ = ["TaskPredictor"]
