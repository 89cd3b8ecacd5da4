"""Building any variant for a test: geometry that satisfies whatever it declares."""

import torch

from zoo.attention import Grid, Pattern, create_attention, get_attention, list_attention

PATTERNS = [pattern.value for pattern in Pattern]
CASES = [
    (name, pattern)
    for name in list_attention()
    for pattern in Pattern
    if pattern in get_attention(name).capabilities.patterns
]


def cases(**capabilities):
    """(name, pattern) of every variant whose capabilities have these values."""
    return [
        (n, p)
        for n, p in CASES
        if all(_has(getattr(get_attention(n).capabilities, k), v) for k, v in capabilities.items())
    ]


def _has(value, wanted):
    return value in wanted if isinstance(wanted, tuple) else bool(value) == wanted


def grid_for(name, tokens):
    """A grid of `tokens` tokens with as many axes as the variant takes; None when it needs none."""
    can = get_attention(name).capabilities
    if not can.needs_grid:
        return None
    if 1 in can.grid_dims:
        return Grid((tokens,))
    rows = max(r for r in range(1, int(tokens**0.5) + 1) if tokens % r == 0)
    return Grid((rows, tokens // rows) if 2 in can.grid_dims else (1, rows, tokens // rows))


def build(name, pattern, *, dim=16, heads=2, m=7, dtype=torch.float32, **geometry):
    """A variant in evaluation mode, its parameters nudged off special values such as zero."""
    torch.manual_seed(1)
    can = get_attention(name).capabilities
    if can.fixed_length:
        geometry.setdefault("length", m)
    if can.needs_grid:
        geometry.setdefault("grid", grid_for(name, m))
    module = create_attention(name, dim, heads, pattern=pattern, **geometry).to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def make(name, pattern="self", **options):
    """A variant as it is initialised, 4 heads of width 6, in double precision and evaluation mode."""
    return create_attention(name, 24, 4, pattern=pattern, **options).double().eval()


def qkv(n=11, m=11, h=4, hk=4, d=6, seed=0):
    """Heads for `attend` of what `make` builds: [2, h, n, d] and twice [2, hk, m, d]."""
    g = torch.Generator().manual_seed(seed)
    new = lambda heads, s: torch.randn(2, heads, s, d, generator=g, dtype=torch.float64)
    return new(h, n), new(hk, m), new(hk, m)


def inputs(pattern, *, b=2, n=7, m=7, dim=16, dtype=torch.float32, seed=2):
    """Arguments (x,) or (x, context)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, dim, generator=g, dtype=dtype)
    return (x, torch.randn(b, m, dim, generator=g, dtype=dtype)) if pattern.cross else (x,)


def ids(values):
    return [f"{n}-{p.value}" for n, p in values]


__all__ = ["CASES", "PATTERNS", "build", "cases", "grid_for", "ids", "inputs", "make", "qkv"]
