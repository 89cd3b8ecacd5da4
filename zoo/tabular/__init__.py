"""Tables: which columns there are, how they become numbers, where the bins lie, how predictions are scored."""

from zoo.tabular.columns import read_table
from zoo.tabular.preprocess import Preprocessor
from zoo.tabular.schema import Schema, Target, infer_schema
from zoo.tabular.scores import score_target

__all__ = ["Preprocessor", "Schema", "Target", "infer_schema", "read_table", "score_target"]
