"""Score mods: biases that follow from places and small tables, built tile by tile and never as a matrix of N x M.

A mod adds ``block(...)`` to the scaled scores. Places are positions on the key axis (query i at ``i + M - N`` and key j at j unless the call gives
``positions``); on a grid, tokens are counted from 0, ``prefix`` tokens without a place first, then the grid in row-major order. B batch, H heads, N queries, M keys.
"""

from dataclasses import dataclass

from torch import Tensor, compiler


@dataclass(frozen=True, eq=False)
class Alibi:
    """``-slope |p_q - p_k|``.

    Args:
        slopes: One per head, [H].
    """

    slopes: Tensor

    def check(self, shape: tuple[int, int, int, int]) -> None:
        _fits("Alibi", "slopes", self.slopes, (shape[1],))

    def tables(self) -> tuple[Tensor, ...]:
        return (self.slopes,)

    def code(self) -> tuple[int, ...]:
        return (1,)

    @staticmethod
    def block(code, tables, rows: slice, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        far = (pos_k[:, None, None] - pos_q[:, None, :, None]).abs()
        return -tables[0][:, None, None] * far


@dataclass(frozen=True, eq=False)
class RelativeTable:
    """``table[h, p_k - p_q]``, one entry per distance; distances beyond the table use its ends.

    Args:
        table: [H, 2 L + 1] for distances -L ... L.
    """

    table: Tensor

    def check(self, shape: tuple[int, int, int, int]) -> None:
        size = self.table.shape[-1]
        if size % 2 == 0:
            raise ValueError(f"RelativeTable: table needs 2 L + 1 entries per head, got {size}")
        _fits("RelativeTable", "table", self.table, (shape[1], size))

    def tables(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def code(self) -> tuple[int, ...]:
        return 2, self.table.shape[-1] // 2

    @staticmethod
    def block(code, tables, rows: slice, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        reach = code[1]
        far = (pos_k[:, None] - pos_q[:, :, None]).clamp(-reach, reach) + reach
        return tables[0][:, far].transpose(0, 1)


@dataclass(frozen=True, eq=False)
class RelativeTable2d:
    """``table[h, row_k - row_q, column_k - column_q]`` on a grid; pairs with a prefix token get nothing.

    Args:
        table: [H, 2 rows - 1, 2 columns - 1].
        prefix: Tokens before the grid.
    """

    table: Tensor
    prefix: int = 0

    def check(self, shape: tuple[int, int, int, int]) -> None:
        size = tuple(self.table.shape[1:])
        if len(size) != 2 or any(s % 2 == 0 for s in size):
            raise ValueError(
                f"RelativeTable2d: table must be [H, 2 rows - 1, 2 columns - 1], got {tuple(self.table.shape)}"
            )
        _fits("RelativeTable2d", "table", self.table, (shape[1], *size))
        _covers("RelativeTable2d", shape, self.prefix + (size[0] + 1) // 2 * ((size[1] + 1) // 2))

    def tables(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def code(self) -> tuple[int, ...]:
        return 3, self.prefix, (self.table.shape[1] + 1) // 2, (self.table.shape[2] + 1) // 2

    @staticmethod
    def block(code, tables, rows: slice, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        _, prefix, height, width = code
        (a, b), (c, d) = (_grid(p, prefix, width) for p in (pos_q, pos_k))
        found = tables[0][:, c[:, None] - a[:, :, None] + height - 1, d[:, None] - b[:, :, None] + width - 1]
        return found.transpose(0, 1) * _placed(pos_q, pos_k, prefix)


@dataclass(frozen=True, eq=False)
class RowColumn:
    """``rows[b, h, i, row_k] + columns[b, h, i, column_k]`` for keys on a grid: O(N (rows + columns)) numbers.

    Args:
        rows: [B, H, N, rows of the grid].
        columns: [B, H, N, columns of the grid].
    """

    rows: Tensor
    columns: Tensor

    def check(self, shape: tuple[int, int, int, int]) -> None:
        height, width = self.rows.shape[-1], self.columns.shape[-1]
        _fits("RowColumn", "rows", self.rows, (*shape[:3], height))
        _fits("RowColumn", "columns", self.columns, (*shape[:3], width))
        _covers("RowColumn", shape, height * width)

    def tables(self) -> tuple[Tensor, ...]:
        return self.rows, self.columns

    def code(self) -> tuple[int, ...]:
        return 4, self.rows.shape[-1], self.columns.shape[-1]

    @staticmethod
    def block(code, tables, rows: slice, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        row, column = _grid(_one(pos_k), 0, code[2])
        return tables[0][:, :, rows][..., row[0]] + tables[1][:, :, rows][..., column[0]]


@dataclass(frozen=True, eq=False)
class Polyline:
    """PPMA's mask in logarithms: the decay along the path that follows the query's row and then the key's column.

    ``L[(h1, w1), (h2, w2)] = -|A[h1, w1] - A[h1, w2]| - |B[h1, w2] - B[h2, w2]|`` with running sums A of the row decays along rows and B of the
    column decays along columns. Pairs with a prefix token get nothing.

    Args:
        rows: Decay of each token along its row, <= 0, [B, H, rows, columns].
        columns: Decay along its column, the same shape.
        prefix: Tokens before the grid.
        column_first: Follow the query's column and then the key's row: the transposed mask.
    """

    rows: Tensor
    columns: Tensor
    prefix: int = 0
    column_first: bool = False

    def check(self, shape: tuple[int, int, int, int]) -> None:
        size = tuple(self.rows.shape[2:])
        _fits("Polyline", "rows", self.rows, (*shape[:2], *(size if len(size) == 2 else (0, 0))))
        _fits("Polyline", "columns", self.columns, tuple(self.rows.shape))
        _covers("Polyline", shape, self.prefix + size[0] * size[1])

    def tables(self) -> tuple[Tensor, ...]:
        return self.rows.cumsum(3).flatten(2), self.columns.cumsum(2).flatten(2)

    def code(self) -> tuple[int, ...]:
        height, width = self.rows.shape[2:]
        return 5, self.prefix, width, height * width, int(self.column_first)

    @staticmethod
    def block(code, tables, rows: slice, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        _, prefix, width, _, column_first = code
        (a, b), (c, d) = (_grid(_one(p)[0], prefix, width) for p in (pos_q, pos_k))
        along, down = tables
        here, there = a * width + b, c * width + d
        if column_first:
            corner = c * width + b[:, None]
            out = (along[..., there][:, :, None] - along[..., corner]).abs()
            out = out + (down[..., here][..., None] - down[..., corner]).abs()
        else:
            corner = a[:, None] * width + d
            out = (along[..., here][..., None] - along[..., corner]).abs()
            out = out + (down[..., there][:, :, None] - down[..., corner]).abs()
        return -out * _placed(pos_q, pos_k, prefix)


ScoreMod = Alibi | RelativeTable | RelativeTable2d | RowColumn | Polyline
_KINDS = (Alibi, RelativeTable, RelativeTable2d, RowColumn, Polyline)


def block(
    code: tuple[int, ...], tables: tuple[Tensor, ...], rows: slice, pos_q: Tensor, pos_k: Tensor
) -> Tensor:
    """What a mod adds to the scores of some queries and keys.

    Args:
        code: Of the mod.
        tables: Of the mod, [B|1, ...].
        rows: The queries.
        pos_q: Their positions, [B|1, n].
        pos_k: Positions of the keys, [B|1, m].

    Returns:
        [B|1, H, n, m].
    """
    out = _KINDS[code[0] - 1].block(code, tables, rows, pos_q, pos_k)
    return out if out.dim() == 4 else out[None]


def check_places(mod: ScoreMod, pos_q: Tensor, pos_k: Tensor, keys: int) -> None:
    """Raise ValueError where positions that a call gives leave the grid: the tables would be read past their end, or from their end."""
    if isinstance(mod, Alibi | RelativeTable) or compiler.is_compiling():
        return
    sides = {"key": pos_k} if isinstance(mod, RowColumn) else {"query": pos_q, "key": pos_k}
    for name, place in sides.items():
        if place.numel() and int(place.max()) >= keys:
            raise ValueError(
                f"{type(mod).__name__}: {name} positions must be below {keys}, the tokens of its grid (with prefix), got {int(place.max())}"
            )


def _grid(place: Tensor, prefix: int, width: int) -> tuple[Tensor, Tensor]:
    at = (place - prefix).clamp(min=0)
    return at.div(width, rounding_mode="floor"), at % width


def _placed(pos_q: Tensor, pos_k: Tensor, prefix: int) -> Tensor:
    return (pos_q >= prefix)[:, None, :, None] & (pos_k >= prefix)[:, None, None]


def _one(place: Tensor) -> Tensor:
    """Positions that all samples share."""
    if place.shape[0] != 1:
        raise ValueError(
            "score_mod: RowColumn and Polyline need positions shared by the batch, [N] or [1, N]"
        )
    return place


def _fits(mod: str, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(t.shape) != shape or not t.is_floating_point():
        raise ValueError(
            f"{mod}: {name} must be floating point {list(shape)}, got {t.dtype} {tuple(t.shape)}"
        )


def _covers(mod: str, shape: tuple[int, int, int, int], tokens: int) -> None:
    if shape[3] != tokens:
        raise ValueError(f"{mod}: its grid (with prefix) has {tokens} tokens, got {shape[3]} keys")
