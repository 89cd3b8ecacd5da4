"""What every operation promises: strided inputs, empty batches, forward mode or a refusal, refusals by name, any shape and mask."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import block_sparse, decay, delta, linear, memory, prefix, selected, softmax
from kernels._common.widths import LARGEST, largest
from kernels.delta import torch as delta_in_torch
from kernels.linear import torch as linear_in_torch
from kernels.softmax import torch as softmax_in_torch

D64 = torch.float64
Call = Callable[..., Tensor]


def _chosen(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Two blocks of four keys for each query: its own and the first."""
    blocks = -(-k.shape[2] // 4)
    own = (torch.arange(q.shape[2]) // 4).clamp(max=max(0, blocks - 1))
    index = torch.stack((torch.zeros_like(own), own), -1).where(torch.stack((own > 0, own >= 0), -1), -1)
    return selected.attention(q, k, v, index.expand(*k.shape[:2], -1, 2), block_size=4, **options)


def _sparse(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return block_sparse.attention(q, k, v, block_sparse.PrefixLM(q.shape[2], 2), **options)


def _delta(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, **options) -> Tensor:
    k = k / (k.square().sum(-1, keepdim=True) + 1e-3).sqrt()
    return delta.delta_scan(q, k, v, v[..., 0].sigmoid(), log_g=log_g, **options)


def _mlstm(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    gates = {"log_g": -k[..., 0].square(), "log_i": v[..., 1]}
    return decay.decay_scan(q, k, v, **gates, normalizer="mlstm", **options)


def _memory(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    k = k / (k.square().sum(-1, keepdim=True) + 1e-3).sqrt()
    weights = torch.eye(k.shape[3], v.shape[3], dtype=q.dtype).expand(k.shape[1], -1, -1)
    gates = {
        "lr": 0.2 * v[..., 0].sigmoid(),
        "log_keep": -k[..., 0].square(),
        "log_momentum": -1 - k[..., 1].square(),
    }
    return memory.memory_scan(q, k, v, weights=(weights,), chunk=4, **gates, **options)


# Operations as functions of queries, keys and values [B, H, N, D]; gates are made of the inputs.
CALLS: dict[str, Call] = {
    "softmax": softmax.attention,
    "softmax window": lambda q, k, v, **o: softmax.attention(q, k, v, window=(3, 1), **o),
    "block_sparse": _sparse,
    "selected": _chosen,
    "linear": linear.linear_attention,
    "linear causal": lambda q, k, v, **o: linear.linear_attention(q, k, v, causal=True, **o),
    "mala": linear.mala,
    "mala causal": lambda q, k, v, **o: linear.mala(q, k, v, causal=True, **o),
    "decay": lambda q, k, v, **o: decay.decay_scan(q, k, v, log_g=-k[..., 0].square(), **o),
    "decay per channel": lambda q, k, v, **o: decay.decay_scan(q, k, v, log_g=-k.square(), **o),
    "mlstm": _mlstm,
    "delta": lambda q, k, v, **o: _delta(q, k, v, -k[..., 0].square(), **o),
    "kda": lambda q, k, v, **o: _delta(q, k, v, -k.square(), **o),
    "memory": _memory,
    "prefix softmax": lambda q, k, v, **o: prefix.prefix_softmax((q * k).sum(-1), v, **o),
}


def make(n, batch=2, seed=0, dtype=D64, width=6):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, n, width, generator=gen, dtype=D64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("name", CALLS)
def test_expanded_and_strided_inputs(name):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 33, 6, generator=gen).expand(2, 2, 33, 6)
    k = torch.randn(2, 33, 2, 6, generator=gen).transpose(1, 2)
    v = torch.randn(2, 2, 6, 66, generator=gen).mT[:, :, ::2]
    found = []
    for tensors in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = CALLS[name](*leaves)
        found.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    assert not q.is_contiguous() and v.stride(-1) != 1
    for strided, dense in zip(*found, strict=True):
        torch.testing.assert_close(strided, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_in_nothing_out(name):
    for batch, n in ((0, 5), (2, 0)):
        leaves = [t.requires_grad_() for t in make(n, batch)]
        out = CALLS[name](*leaves)
        assert out.shape == (batch, 2, n, 6)
        grads = torch.autograd.grad(out.sum(), leaves, materialize_grads=True)
        assert [g.shape for g in grads] == [t.shape for t in leaves]


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_the_transpose_of_reverse_mode(name):
    """<w, J t> = <J^T w, t>; the kernels, which know no tangents, refuse."""
    inputs, tangents, (weight, *_) = make(9), make(9, seed=1), make(9, seed=2)
    options = {"higher_order": True} if name in ("softmax", "softmax window", "selected") else {}
    _, along = torch.func.jvp(lambda *t: CALLS[name](*t, **options), tuple(inputs), tuple(tangents))
    leaves = [t.requires_grad_() for t in inputs]
    back = torch.autograd.grad((CALLS[name](*leaves) * weight).sum(), leaves)
    want = sum((g * t).sum() for g, t in zip(back, tangents, strict=True))
    torch.testing.assert_close((along * weight).sum(), want, rtol=1e-9, atol=1e-9)
    with pytest.raises(NotImplementedError, match="forward-mode.*impl='torch'"):
        single = [t.detach().float() for t in inputs]
        torch.func.jvp(lambda *t: CALLS[name](*t, impl="triton"), tuple(single), tuple(single))


@pytest.mark.parametrize("name", CALLS)
def test_an_explicit_choice_never_falls_back(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = make(5)
    with pytest.raises(NotImplementedError, match="float64 inputs; use impl='torch'"):
        CALLS[name](q, k, v, impl="triton")
    with pytest.raises(NotImplementedError, match="needs tensors on a GPU"):
        CALLS[name](q.float(), k.float(), v.float(), impl="triton")


# What a line of the table of head sizes limits.
WIDE: dict[str, tuple[str, Call]] = {
    **{name: (name.split()[0], CALLS[name]) for name in ("softmax", "softmax window", "block_sparse", "selected", "linear", "delta")},
    "kda": ("delta", CALLS["kda"]),
    "memory": ("memory", CALLS["memory"]),
    "mala": ("linear", CALLS["mala"]),
    "function": ("linear", lambda q, k, v, **o: linear.linear_attention(q, k, v, feature=torch.exp, **o)),
    "taylor2": ("taylor2", lambda q, k, v, **o: linear.linear_attention(q, k, v, feature="taylor2", **o)),
    "taylor2 causal": (
        "taylor2", lambda q, k, v, **o: linear.linear_attention(q, k, v, feature="taylor2", causal=True, **o)
    ),
    "scores": ("selected", lambda q, k, v, **o: selected.block_scores(q, k, torch.eye(k.shape[2]), **o)),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kernels_refuse_heads_beyond_the_table(name, dtype, monkeypatch):
    """The same words from every operation, at the first size too large; at the last one that fits, only the device is missing."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    op, call = WIDE[name]
    short = str(dtype).removeprefix("torch.")
    limit = largest(op, short)
    if name == "function":  # asked for its size only where kernels may run
        monkeypatch.setattr("kernels.linear.options.interpreting", lambda: True)
    with pytest.raises(
        NotImplementedError, match=rf"{limit + 1} in {short}, only up to {limit}; use impl='torch'"
    ):
        call(*make(3, width=limit + 1, dtype=dtype), impl="triton")
    with pytest.raises(NotImplementedError, match="needs tensors on a GPU"):
        call(*make(3, width=limit, dtype=dtype), impl="triton")


def test_the_gate_compiles_the_head_sizes_that_are_claimed():
    from kernels.gate import keys_of, operations

    assert set(operations()) <= set(LARGEST)
    for op in ("delta", "prefix"):
        dims = {
            dtype: {key.dim for key in keys_of(op, ["sm_80"]) if key.dtype == dtype}
            for dtype in ("bfloat16", "float32")
        }
        assert max(dims["float32"]) == (largest(op, "float32") or 256)
        assert op == "prefix" or max(dims["bfloat16"]) == largest(op, "bfloat16")


@pytest.mark.parametrize(
    "name", ["block_sparse", "selected", "linear causal", "mala causal", "prefix softmax"]
)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    keep=st.floats(0.0, 1.0),
    size=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_any_length_mask_and_size(name, n, keep, size, seed):
    """Torch equals reference in values and gradients; a masked key has none, and a row without keys is zero."""
    q, k, v = make(n, seed=seed)
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < keep
    found = []
    for impl in ("reference", "torch"):
        leaves = [(size * q).requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_()]
        out = CALLS[name](*leaves, key_mask=mask, impl=impl)
        found.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for want, have in zip(*found, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-8)
    assert (found[1][3].transpose(1, 2)[~mask] == 0).all() and (found[1][0][~mask.any(1)] == 0).all()


@pytest.mark.parametrize("name", ["linear causal", "mala causal", "kda", "softmax window"])
def test_slabs_of_long_sequences_change_nothing(name, monkeypatch):
    """A last slab that is not full, masked keys, and gradients through the states handed on."""
    long = softmax_in_torch.WINDOW_TOKENS + 44 if name == "softmax window" else 45
    leaves = [t.requires_grad_() for t in make(long)]
    options = {} if name == "softmax window" else {"key_mask": torch.rand(2, long) > 0.3}
    found = []
    for small in (False, True):
        if small:
            monkeypatch.setattr(softmax_in_torch, "WINDOW_SLAB", 64)
            monkeypatch.setattr(linear_in_torch, "slab_length", lambda t: 20)
            monkeypatch.setattr(delta_in_torch, "slab_length", lambda t: 20)
        out = CALLS[name](*(t.float() for t in leaves), **options)
        found.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for whole, slabs in zip(*found, strict=True):
        torch.testing.assert_close(slabs, whole, rtol=1e-4, atol=1e-5)


def test_offsets_beyond_int32_are_shapes_only():
    """B H N D of 2^32 under fake tensors: shapes and strides of the operators of scans and sums are right without the memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kernels.decay import ops as decay_ops
    from kernels.delta import ops as delta_ops
    from kernels.delta.walk import delta_walk
    from kernels.linear import ops as linear_ops
    from kernels.memory import ops as memory_ops
    from kernels.prefix import ops as prefix_ops

    b, h, n, d = 64, 64, 8192, 128
    with FakeTensorMode():
        q = torch.empty(b, h, n, d, dtype=torch.bfloat16)
        assert q.numel() > 2**31
        state, *sums = linear_ops.state_fwd(q, q, None, None, None, "elu1")
        assert state.shape == (b, h, d, d) and sums[0].shape == (b, h, d)
        out = linear_ops.read_fwd(
            q, None, state, sums[0], None, None, q[:, 0, 0, 0], q[:, 0, 0, 0], "denom", "elu1"
        )
        assert out.shape == q.shape
        out, last = decay_ops.decay_scan_fwd(q, q, q, None, None, True, False, True)
        assert out.stride(0) == h * n * d and out.dtype == torch.float32 and last.shape == (b, h, d, d)
        wide = torch.empty(b * h, n // 64, 64, d)
        start = torch.empty(b * h, d, d)
        x, met, last = delta_ops.delta_walk_fwd(wide, wide, wide, None, None, start, False, "bfloat16")
        assert x.shape == wide.shape and met.shape == (b * h, n // 64, d, d) and last.shape == start.shape
        gate = torch.empty(b * h, n // 64, 4)
        x, _, met, *_ = memory_ops.memory_walk_fwd(
            wide, wide, None, wide, None, gate, None, None, start, start, False, "float32"
        )
        assert x.shape == wide.shape and met.shape == (b * h, n // 64, d, d)
        square = torch.empty(b * h, n // 64, 64, 64)
        assert (
            delta_walk(wide, wide, square, square, wide, None, None, start, False)[0].stride()
            == wide.stride()
        )
        flat = torch.empty(b * h, n, d)
        assert prefix_ops.diag_scan_fwd(flat, flat, None).shape == flat.shape
