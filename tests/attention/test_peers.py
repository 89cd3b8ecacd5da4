"""Layers with the same weights against independent implementations, where those run on a CPU.

flash-linear-attention (Songlin Yang, Yu Zhang et al.), native-sparse-attention-pytorch and titans-pytorch (both Phil Wang) come with the
extra `dev`; mlstm_kernels (NX-AI) does not, its licence is not permissive. Where a package departs from its paper, or a choice is free, the test
says how the two are brought together.
"""

import __future__

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from variants import build, inputs

from zoo.attention import Pattern
from zoo.attention.linear import LinearAttention

D64 = torch.float64
CAUSAL = Pattern.CAUSAL_SELF


def missing(distribution):
    return f"{distribution} is not installed (pip install {distribution})"


def plain(package, *files):
    """The undecorated definitions of some files, in one namespace: importing them needs Triton, a GPU on some platforms, and seconds."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(missing({"fla": "fla-core"}.get(package, package)))
    einops = pytest.importorskip("einops", reason=missing("einops"))
    scope = {"torch": torch, "nn": nn, "F": F, "rearrange": einops.rearrange}
    for file in files:
        tree = ast.parse((Path(found.origin).parent / file).read_text())
        tree.body = [
            node
            for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not any(getattr(part, "decorator_list", None) for part in ast.walk(node))
        ]
        exec(compile(tree, file, "exec", flags=__future__.annotations.compiler_flag), scope)
    return SimpleNamespace(**scope)


def t(x):
    return x.transpose(1, 2)


def same(have, want, leaves, tolerance):
    """Values, and gradients of a function of them."""
    torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(o.sin().sum(), leaves, retain_graph=True) for o in (have, want)]
    for mine, other in zip(*grads, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("pattern", [CAUSAL, Pattern.CROSS])
def test_hedgehog(pattern):
    """Theirs computes the sums in float32 and doubles y before the softmax; the sums over all keys are its final state."""
    peer = plain("fla", "modules/feature_map.py", "ops/linear_attn/naive.py")

    def features(side, x):
        maps = [peer.HedgehogFeatureMap(8) for _ in range(2)]
        for own, weight, bias in zip(maps, side.linear.weight, side.linear.bias, strict=True):
            own.load_state_dict({"layer.weight": weight.T, "layer.bias": bias[0]})
        return torch.stack([own(head) for own, head in zip(maps, x.unbind(1), strict=True)], 1)

    module = build("hedgehog", pattern, sharpness=2.0, eps=1e-10)
    arguments = [x.requires_grad_() for x in inputs(pattern)]
    x, context = arguments[0], arguments[-1]
    q, k, v = super(LinearAttention, module).project(x, context, context)
    phi_q, phi_k = features(module.features_q, q), features(module.features_k, k)
    torch.testing.assert_close(module.features_q(q), phi_q)
    want, state = peer.naive_recurrent_linear_attn(
        t(phi_q), t(phi_k), t(v), scale=1.0, normalize=True, output_final_state=True
    )
    if pattern is Pattern.CROSS:
        kv, total = state
        want = t(phi_q @ kv / (phi_q @ total.permute(0, 2, 3, 1)))
    want = module.proj(want.flatten(2))
    same(module(*arguments), want, arguments, 1e-5)


@pytest.mark.parametrize("lower", [None, -5.0])
def test_kda(lower):
    """Gates and recurrence; theirs computes both in float32."""
    peer = plain("fla", "ops/kda/gate.py", "ops/kda/naive.py")
    module = build("kda", CAUSAL, lower=lower)
    with torch.no_grad():
        module.log_a.normal_()  # start values forget nearly nothing, or under the bound nearly all
        module.dt_bias.normal_()
    (x,) = inputs(CAUSAL)
    x.requires_grad_()
    q, packed, v = module.project(x, x, x)
    k, gates = module._split(packed, v.dtype)
    raw = module.decay(x).unflatten(-1, (2, 8))
    if lower is None:
        log_a = peer.naive_kda_gate(raw, module.log_a, module.dt_bias)
    else:
        log_a = peer.naive_kda_lowerbound_gate(raw, module.log_a, module.dt_bias, lower_bound=lower)
    torch.testing.assert_close(t(gates[..., 1:]), log_a, rtol=1e-5, atol=1e-6)
    want, _ = peer.naive_recurrent_kda(t(q), t(k), t(v), log_a, module.strength(x).sigmoid())
    same(module.attend(q, packed, v), t(want), [x, module.log_a, module.dt_bias], 1e-5)


@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent", "sigmoid"])
def test_mlstm(form):
    """With eps = 0 its bound exp(-m) is our 1; its sigmoid form normalises unless told otherwise, the paper does not."""
    folder = {"recurrent": "recurrent", "chunkwise": "chunkwise/native", "parallel": "parallel/native"}
    files = ("native_step.py", "native_sequence.py") if form == "recurrent" else ("fw.py",)
    peer = plain("mlstm_kernels", *(f"torch/{folder.get(form, 'parallel/native_siging')}/{f}" for f in files))
    module = build("mlstm", CAUSAL, gate="sigmoid" if form == "sigmoid" else "exp", dtype=D64)
    with torch.no_grad():
        module.gate_bias.normal_(0.0, 3.0)  # stabilisers above and below zero
    (x,) = inputs(CAUSAL, n=12, dtype=D64)
    x.requires_grad_()
    q, packed, v = module.project(x, x, x)
    k, gates = module._split(packed, v.dtype)
    call = (q, k, v, *(module.gate_map(x) + module.gate_bias).mT.chunk(2, 1))
    state = None
    if form == "sigmoid":
        want, _ = peer.mlstm_siging_parallel_fw(*call, normalize=False)
    elif form == "parallel":
        want, _, _ = peer.mlstm_parallel_fw(*call, eps=0.0)
    elif form == "chunkwise":
        want, _, _, state, _ = peer.mlstm_chunkwise_fw(*call, eps=0.0, chunk_size=4, return_last_states=True)
    else:
        want, state = peer.mlstm_recurrent_sequence__native_fw(
            *call, eps=0.0, dtype_state=D64, return_last_states=True
        )
    same(module.attend(q, packed, v), want, [x, module.gate_map.weight], 1e-10)
    if state is not None:
        ours = module.write(k, v, gates, None, None)
        c, n, m = state
        theirs = torch.cat((c, n[..., None]), -1) * m[..., None].exp()
        torch.testing.assert_close(ours.kv * ours.exponent[..., None, None].exp(), theirs)


def nsa_pair(causal, groups, chosen, select, block=4):
    """Ours and its peer with equal weights, blocks every 4 tokens.

    The peer always has one memory slot among the compressed keys. Its key is put where no query looks: channel 0 of every query is 1
    (x[..., 0] is), that of the slot is very negative. Rotary frequencies of zero turn nothing. Its window of w reaches w tokens back.
    """
    package = pytest.importorskip(
        "native_sparse_attention_pytorch", reason=missing("native-sparse-attention-pytorch")
    )
    window = 4 if causal else 7
    ours = build(
        "nsa", CAUSAL if causal else Pattern.SELF, dim=24, heads=4, dtype=D64, qkv_bias=False, shared_kv=True,
        num_kv_heads=groups, compress_block=block, compress_stride=4, select_block=select, window=window,
        num_selected=chosen + causal, initial_blocks=0, local_blocks=int(causal),
    )  # fmt: skip
    mlp = nn.Sequential(nn.Flatten(-2), nn.Linear(block * 6, 12), nn.GELU(), nn.Linear(12, 6))
    theirs = package.SparseAttention(
        dim=24, dim_head=6, heads=4, kv_heads=groups, sliding_window_size=3, compress_block_size=block,
        compress_block_sliding_stride=4, selection_block_size=select, num_selected_blocks=chosen,
        causal=causal, norm=False, compress_mlp=mlp,
    ).double()  # fmt: skip
    with torch.no_grad():
        ours.proj.bias.zero_()
        ours.gate.weight.normal_(0.0, 0.3)
        ours.qkv.weight[:24:6] = torch.eye(24)[0]
        theirs.to_qkv.weight.copy_(ours.qkv.weight)
        theirs.combine_heads.weight.copy_(ours.proj.weight)
        theirs.compress_mem_kv[0, ..., 0] = -1e4
        theirs.rotary_emb.freqs.zero_()
        theirs.k_intrablock_positions.copy_(ours.compress_k.place.expand(groups, -1, -1))
        theirs.v_intrablock_positions.copy_(ours.compress_v.place.expand(groups, -1, -1))
    for own, peer in ((ours.compress_k, theirs.k_compress), (ours.compress_v, theirs.v_compress)):
        peer[1].load_state_dict(own.up.state_dict())
        peer[3].load_state_dict(own.down.state_dict())
    theirs.to_strategy_combine[0] = ours.gate
    return ours, theirs


@pytest.mark.parametrize(
    ("causal", "groups", "chosen", "select"),
    [(True, 4, 2, 4), (True, 2, 8, 4), (True, 2, 8, 8), (False, 4, 2, 4), (False, 2, 8, 4)],
)
def test_nsa(causal, groups, chosen, select):
    """All three branches and the choice of blocks, blocks of compression side by side.

    A group's choice is by mean logits there and by summed probabilities in the paper, so heads that share keys read all blocks here. A
    compressed block is visible there from the token after its last one, in the paper from its last one on: rows that end a block are
    compared without that branch.
    """
    ours, theirs = nsa_pair(causal, groups, chosen, select)
    n = 26 if causal else 24
    (x,) = inputs(CAUSAL, n=n, dim=24, dtype=D64)
    x[..., 0] = 1.0
    x.requires_grad_()
    rows = [i for i in range(n) if not causal or i % 4 != 3]
    same(ours(x)[:, rows], theirs(x)[:, rows], [x], 1e-9)
    with torch.no_grad():
        ours.gate.bias[::3] = -60.0
    same(ours(x), theirs(x), [x], 1e-9)


def test_nsa_overlapping_blocks():
    """There a first block that starts before the sequence is padded; the others are ours."""
    ours, theirs = nsa_pair(True, 2, 2, 4, block=8)
    k, v = torch.randn(2, 2, 2, 26, 6, dtype=D64)
    padded = theirs.split_compress_window(k[:, :, :24])
    want = theirs.k_compress(padded + theirs.k_intrablock_positions[:, None])
    torch.testing.assert_close(ours._compress(k, v, None)[0], want[:, :, 1:])


@pytest.mark.parametrize(
    ("memory", "chunk", "pattern"),
    [
        ("linear", 1, CAUSAL),
        ("linear", 3, Pattern.CAUSAL_CROSS),
        ("mlp", 1, Pattern.CAUSAL_CROSS),
        ("mlp", 3, CAUSAL),
    ],
)
def test_titans(memory, chunk, pattern):
    """Steps, momentum and decay per token; its `batch_size` tokens share the memory at which gradients are taken, our `chunk`.

    Its loss is given as a sum over channels (its default is their mean). Its LayerNorm gain is a part of the memory: its factors per weight
    keep it at one. RMS norms of q and k with a gain of D^-1/2 bring them to length 1.
    """
    peer = pytest.importorskip("titans_pytorch", reason=missing("titans-pytorch"))
    deep = memory == "mlp"
    ours = build(
        "titans_mem",
        pattern,
        memory=memory,
        chunk=chunk,
        conv=0,
        output_gate=False,
        qkv_bias=False,
        dtype=D64,
    )
    theirs = peer.NeuralMemory(
        dim=16, heads=2, dim_head=8, chunk_size=1, batch_size=chunk, activation=nn.SiLU(), pre_rmsnorm=False, qk_rmsnorm=True,
        post_rmsnorm=True, default_step_transform_max_lr=0.25, per_parameter_lr_modulation=deep, mem_model_norm_add_residual=deep,
        store_memory_loss_fn=lambda have, want: (have - want).square().sum(-1), model=peer.MemoryMLP(8, 1 + deep, 2.0),
    ).double()  # fmt: skip
    theirs.retrieve_gate = None
    with torch.no_grad():
        ours.gate_bias.normal_()
        ours.proj.bias.zero_()
        if deep:
            ours.memory_gain.fill_(1.0)
            theirs.to_layer_modulation[0].weight.zero_()
            theirs.to_layer_modulation[0].bias.copy_(torch.tensor([-1e3, 1e3, 1e3]).repeat(2))
        weights = theirs.memory_model_parameters[int(deep) :]
        for own, other in zip(ours.memory_weights, weights, strict=True):
            other.copy_(own)
        projections = (
            (ours.q.weight, ours.k.weight, ours.v.weight) if pattern.cross else ours.qkv.weight.chunk(3)
        )
        maps = (theirs.to_queries, theirs.to_keys, theirs.to_values)
        for own, other in zip(projections, maps, strict=True):
            other[0].weight.copy_(own)
        gates = (theirs.to_adaptive_step, theirs.to_decay_factor, theirs.to_momentum)
        for own, bias, other in zip(
            ours.gate_map.weight.chunk(3), ours.gate_bias.chunk(3), gates, strict=True
        ):
            other[0].weight.copy_(own)
            other[0].bias.copy_(bias)
        for norm in (theirs.q_norm, theirs.k_norm):
            norm.gamma.fill_(8**-0.5 - 1)
            norm.rmsnorm.eps = 1e-6 / 8
        theirs.multihead_rmsnorm.gamma.copy_(ours.gain - 1)
        theirs.multihead_rmsnorm.rmsnorm.eps = 1e-5
        theirs.combine_heads.weight.copy_(ours.proj.weight)
    leaves = [x.requires_grad_() for x in inputs(pattern, dtype=D64)]
    want, state = theirs(leaves[0], store_seq=leaves[-1])
    same(ours(*leaves), want, leaves, 1e-8)
    _, packed, v = ours.project(leaves[0], leaves[-1], leaves[-1])
    k, steps = ours._split(packed, D64)
    final = ours.write(k, v, steps, None, None)
    names = theirs.memory_model_parameter_names[int(deep) :]
    last, momenta = state.states
    for i, name in enumerate(names):
        torch.testing.assert_close(final.weights[i].flatten(0, 1), last[name])
        torch.testing.assert_close(final.momenta[i].flatten(0, 1), momenta[name][0])
