"""What trained attention does: sinks, how spread its rows are, and which heads a model needs. `python -m zoo analyse` prints it."""

from zoo.analysis.heads import head_ablation, head_importance
from zoo.analysis.sinks import LayerSinks, sink_scores, sinks

__all__ = ["LayerSinks", "head_ablation", "head_importance", "sink_scores", "sinks"]
