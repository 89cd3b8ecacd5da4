"""Where the pieces of a piecewise-linear embedding begin and end.

Source: Gorishniy et al., "On embeddings for numerical features in tabular deep learning", arXiv:2203.05556.
"""

from __future__ import annotations

import numpy as np

from zoo.errors import ConfigError


def bin_edges(
    values: np.ndarray,
    targets: np.ndarray,
    *,
    method: str = "tree",
    num_bins: int = 48,
    min_leaf: int = 20,
    seed: int = 0,
) -> list[float]:
    """Edges b_0 < ... < b_T of one column, from training rows only.

    Args:
        values: Column, [N]; NaN where missing.
        targets: Numeric targets, [N, T]: standardised values, 0/1 for a class. A tree over several columns makes
            bins that serve them together; on a 0/1 column its squared error is the Gini impurity up to a factor.
        method: "tree", the split points of a small decision tree on this column alone; "quantile".
        num_bins: Largest T, at least 2.
        min_leaf: Fewest rows in a bin of the tree; a tenth of the rows when that is less.
        seed: Of the tree, which shuffles ties.

    Returns:
        At least two edges; a column with a single value gets a bin of width 1 around it.
    """
    if num_bins < 2:
        raise ConfigError(f"data.num_bins={num_bins} must be at least 2")
    if method not in ("tree", "quantile"):
        raise ConfigError(f"data.bins={method!r}: choose tree or quantile")
    kept = ~np.isnan(values)
    x = values[kept]
    if not len(x) or x.min() == x.max():
        centre = float(x[0]) if len(x) else 0.0
        return [centre - 0.5, centre + 0.5]
    if method == "tree":
        from sklearn.tree import DecisionTreeRegressor

        leaf = max(1, min(min_leaf, len(x) // 10))
        tree = DecisionTreeRegressor(max_leaf_nodes=num_bins, min_samples_leaf=leaf, random_state=seed)
        tree.fit(x[:, None], targets[kept])
        inner = tree.tree_.threshold[tree.tree_.feature >= 0]
    else:
        inner = np.quantile(x, np.linspace(0, 1, num_bins + 1)[1:-1])
    edges = np.unique(np.concatenate(([x.min()], inner, [x.max()])).astype(np.float32))
    # Edges closer than the resolution of the values would give slopes of 1e6 and more.
    keep = np.append(True, np.diff(edges) > 1e-6 * (edges[-1] - edges[0]))
    edges = edges[keep]
    return [float(e) for e in edges] if len(edges) > 1 else [float(x.min()) - 0.5, float(x.max()) + 0.5]
