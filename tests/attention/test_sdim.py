"""Identities of SDIM: table and direct sum, expected weights, limits."""

import math

import pytest
import torch

from zoo.attention import create_attention
from zoo.errors import ConfigError


def _direct(module, q, k, v, mask):
    """The definition, one query and one signature at a time."""
    code_q, code_k = module.signatures(q), module.signatures(k)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype)
    for b, h, n in torch.cartesian_prod(*(torch.arange(s) for s in q.shape[:3])).tolist():
        for g in range(module.groups):
            same = (code_k[b, h, :, g] == code_q[b, h, n, g]) & mask[b]
            total = v[b, h, same].sum(0)
            if module.l2_norm and total.norm() > 0:
                total = total / total.norm()
            out[b, h, n] += total / module.groups
    return out


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("bits", [1, 3])
def test_table_equals_direct_sum(bits: int, l2_norm: bool) -> None:
    module = create_attention(
        "sdim", 8, 2, pattern="cross", hashes=12, bits=bits, l2_norm=l2_norm, head_dim=6
    )
    q, k, v = torch.randn(2, 2, 3, 6), torch.randn(2, 2, 11, 6), torch.randn(2, 2, 11, 5)
    mask = torch.rand(2, 11) > 0.3
    table = module.table(k, v, mask)
    torch.testing.assert_close(module.read(q, table), _direct(module, q, k, v, mask))
    halves = module.table(k[:, :, :4], v[:, :, :4], mask[:, :4]) + module.table(
        k[:, :, 4:], v[:, :, 4:], mask[:, 4:]
    )
    torch.testing.assert_close(halves, table)


def test_causal_form_equals_a_table_of_every_prefix() -> None:
    module = create_attention("sdim", 8, 1, pattern="causal_self", hashes=6, bits=2, head_dim=4)
    q, k, v = (torch.randn(2, 1, 9, 4) for _ in range(3))
    out = module.attend(q, k, v)
    for n in range(9):
        expected = module.read(q[:, :, n : n + 1], module.table(k[:, :, : n + 1], v[:, :, : n + 1]))
        torch.testing.assert_close(out[:, :, n : n + 1], expected)


def test_share_of_collisions_is_the_stated_function_of_the_angle() -> None:
    module = create_attention("sdim", 8, 1, pattern="cross", hashes=60_000, bits=3, head_dim=8)
    cosine = torch.tensor([-0.9, 0.0, 0.5, 0.95])
    q = torch.eye(8)[:1]
    k = cosine[:, None] * q + (1 - cosine[:, None] ** 2).sqrt() * torch.eye(8)[1]
    same = module.signatures(k[None, None]) == module.signatures(q[None, None])
    share = same.float().mean(-1).flatten()
    expected = module.expected_weight(cosine)
    assert (share - expected).abs().max() < 5 * 0.5 / math.sqrt(20_000)
    assert (expected.diff() > 0).all()


def test_identical_keys_all_collide() -> None:
    module = create_attention("sdim", 4, 1, pattern="cross", l2_norm=False, head_dim=4)
    key = torch.randn(1, 1, 1, 4)
    v = torch.randn(1, 1, 7, 3)
    torch.testing.assert_close(module.attend(key, key.expand(1, 1, 7, 4), v), v.sum(2, keepdim=True))


def test_settings_out_of_range_name_the_rule() -> None:
    with pytest.raises(ConfigError, match="multiple of attention.bits=5"):
        create_attention("sdim", 8, 1, pattern="cross", hashes=48, bits=5)
    with pytest.raises(ConfigError, match="between 1 and 8"):
        create_attention("sdim", 8, 1, pattern="cross", bits=0)
