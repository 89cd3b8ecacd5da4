"""Forecasters of sensor networks: symmetries, causality, graphs, groups, published switches."""

import numpy as np
import pytest
import torch
from torch import nn

from zoo.attention.slots import resolve_slots
from zoo.errors import CapabilityError, ConfigError
from zoo.layers.graph import (
    GroupAttention,
    SparseGraphAttention,
    best_group_size,
    edges_of,
    laplacian_eigenvectors,
    node2vec,
)
from zoo.layers.graph_time import SegmentAttention, TemporalGraphClassifier
from zoo.models.registry import build_model, get_model

MODELS = ("gman", "staeformer", "stid", "tgatv2")
N, P, Q, LAGS = 6, 12, 4, [24, 168]


def factories(name, options, attention="softmax"):
    return resolve_slots(get_model(name).slots(**options), {"name": attention})


def build(name, attention="softmax", **options):
    options = {"num_sensors": N, "history_steps": P, "horizon_steps": Q, "lag_steps": LAGS, **options}
    if name in ("gman", "staeformer"):
        options.setdefault("size", "micro")
    torch.manual_seed(0)
    model = build_model(name, factories(name, options, attention), **options).eval()
    model.scaler.set_statistics(*statistics(model))
    graph = ring()
    for module in model.modules():
        if hasattr(module, "set_graph"):
            module.set_graph(graph)
    return model


def statistics(model):
    rng = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.rand(*shape, generator=rng)
    return draw(N) * 30 + 20, draw(N) * 5 + 3, draw(168, N) * 60, draw(N) + 1


def ring(nodes=N):
    graph = torch.eye(nodes)
    index = torch.arange(nodes)
    graph[index, (index + 1) % nodes] = 0.7
    graph[0, nodes // 2] = 0.3
    return graph


def inputs(batch=3, looks=2, nodes=N):
    rng = torch.Generator().manual_seed(2)
    rand = lambda *shape: torch.rand(*shape, generator=rng)
    x = {
        "history": rand(batch, P, nodes) * 60,
        "history_seen": rand(batch, P, nodes) > 0.1,
        "clock": torch.tensor([3, 100, 166])[:batch],
    }
    if looks:
        x |= {
            "known": rand(batch, looks, Q, nodes) * 60,
            "known_seen": rand(batch, looks, Q, nodes) > 0.1,
        }
    return x


def shuffled(x, order):
    return {k: v if k == "clock" else v[..., order] for k, v in x.items()}


SENSOR_TENSORS = {
    "scaler.mean": 0,
    "scaler.std": 0,
    "scaler.spread": 0,
    "scaler.profile": 1,
    "adaptive": 1,
    "sensors": 0,
    "sensor_table": 0,
}


def permute_model(model, order):
    """The same model for sensors in another order."""
    state = model.state_dict()
    for name in list(state):
        if name in SENSOR_TENSORS:
            state[name] = state[name].index_select(SENSOR_TENSORS[name], order)
        elif name.endswith("adjacency"):
            state[name] = state[name][order][:, order]
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_shape_gradient_and_missing_cells(name):
    model = build(name)
    x = inputs()
    x["history"].requires_grad_()
    out = model(**x)
    assert out.shape == (3, Q, N) and out.isfinite().all()
    out.sum().backward()
    assert (x["history"].grad[~x["history_seen"]] == 0).all()
    assert (x["history"].grad[x["history_seen"]] != 0).any()
    changed = dict(x, history=torch.where(x["history_seen"], x["history"], 1e6))
    torch.testing.assert_close(model(**changed), out)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gman", {}),
        ("gman", {"graph": "bias"}),
        ("gman", {"graph": "sparse"}),
        ("gman", {"size": "metr_la", "depth": 1, "embedding": "learned"}),
        ("staeformer", {}),
        ("staeformer", {"graph": "mask", "patch_steps": 4, "temporal_depth": 1}),
        ("stid", {}),
        ("tgatv2", {}),
    ],
)
def test_sensor_permutation_equivariance(name, options):
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    model = build(name, **options)
    x = inputs()
    plain = model(**x)
    turned = permute_model(model, order)(**shuffled(x, order))
    torch.testing.assert_close(turned, plain[..., order], atol=2e-4, rtol=1e-5)
    assert not torch.allclose(turned, plain, atol=1e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_causal_encoder_ignores_later_steps(causal):
    model = build("gman", size="paper", depth=2, temporal_causal=causal, embedding="learned", embedding_dim=8)
    x = inputs()
    slots = model.scaler.slots(x["clock"])
    before = model.encode(x["history"], x["history_seen"], slots)[0]
    later = x["history"].clone()
    later[:, 7:] += 50
    after = model.encode(later, x["history_seen"], slots)[0]
    same = torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert same is causal
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def test_published_sizes_differ_as_stated():
    paper, metr, bay = (
        build("gman", size=s, embedding="laplacian") for s in ("paper", "metr_la", "pems_bay")
    )
    assert (len(paper.encoder), len(metr.encoder), len(bay.encoder)) == (3, 5, 1)
    slots = {s: get_model("gman").slots(size=s)["temporal"].pattern.value for s in ("metr_la", "pems_bay")}
    assert slots == {"metr_la": "causal_self", "pems_bay": "self"}
    assert paper.encoder[0].temporal.separate_value and not metr.encoder[0].temporal.separate_value
    assert metr.output_drop.p == 0.1 and bay.output_drop.p == 0
    # Official widths: 64 channels, one scaled reading in, batch norm before each ReLU.
    assert metr.input.first.in_features == 1 and metr.output_second.in_features == 64
    assert sum(isinstance(m, nn.BatchNorm1d) for m in metr.modules()) > 0


def test_gman_block_by_hand():
    model = build("gman", norm="none", num_heads=2, head_dim=3, lag_steps=[])
    block = model.encoder[0]
    h, e = torch.randn(2, 5, N, 6), torch.randn(2, 5, N, 6)
    z = torch.cat((h, e), -1)

    def attend(module, x):  # [..., L, 12] -> [..., L, 6]
        q, k, v = torch.relu(module.qkv.linear(x)).chunk(3, -1)
        out = []
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            scores = q[..., part] @ k[..., part].mT / 3**0.5
            out.append(scores.softmax(-1) @ v[..., part])
        return module.proj(torch.cat(out, -1))

    space = attend(block.spatial, z)
    time = attend(block.temporal, z.transpose(1, 2)).transpose(1, 2)
    gate = torch.sigmoid(space @ block.gate_spatial.weight.T + block.gate_temporal(time))
    mixed = gate * space + (1 - gate) * time
    wanted = h + block.fuse.second(torch.relu(block.fuse.first(mixed)))
    torch.testing.assert_close(block(h, e), wanted, atol=1e-5, rtol=1e-5)


def test_transform_attention_keys_see_only_the_calendar():
    model = build("gman", embedding="learned")
    e_past, e_future, h = torch.randn(5, P, 32), torch.randn(5, Q, 32), torch.randn(5, P, 32)
    weights = model.transform.attention_map(e_future, e_past, h)
    torch.testing.assert_close(weights, model.transform.attention_map(e_future, e_past, 2 * h))
    assert weights.shape == (5, 4, Q, P)


def test_dense_with_mask_equals_sparse():
    graph = ring(9)
    graph[3] = 0  # hears nobody
    sparse = SparseGraphAttention(16, 4).double()
    slot = get_model("staeformer").slots(graph="mask")["spatial"]
    dense = resolve_slots({"spatial": slot}, {"name": "softmax"})["spatial"](16, 4).double()
    dense.load_state_dict(sparse.state_dict())
    x = torch.randn(5, 9, 16, dtype=torch.float64)
    bias = torch.zeros(9, 9, dtype=torch.float64).masked_fill(graph <= 0, -torch.inf)[None, None]
    torch.testing.assert_close(sparse(x, edges=edges_of(graph)), dense(x, bias=bias), atol=1e-10, rtol=0)
    for dtype in (torch.float32,):
        sparse, dense = sparse.to(dtype), dense.to(dtype)
        a, b = sparse(x.to(dtype), edges=edges_of(graph)), dense(x.to(dtype), bias=bias.to(dtype))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_mask_and_sparse_gman_agree():
    mask, sparse = build("gman", graph="mask"), build("gman", graph="sparse")
    state = {k.replace("graph.adjacency", "adjacency"): v for k, v in mask.state_dict().items()}
    sparse.load_state_dict(state)
    x = inputs()
    torch.testing.assert_close(mask(**x), sparse(**x), atol=1e-3, rtol=1e-5)
    free = build("gman", graph="none")
    free.load_state_dict({k: v for k, v in mask.state_dict().items() if "adjacency" not in k})
    assert not torch.allclose(free(**x), mask(**x), atol=1e-2)


def test_edges_beside_values_from_features_alone():
    """The paper's size with sparse attention was refused by its own temporal attention, which got no values."""
    assert build("gman", size="paper", graph="sparse", depth=1)(**inputs()).isfinite().all()


def test_isolated_sensors_do_not_mix():
    model = build("staeformer", graph="mask")
    model.graph.set_graph(torch.eye(N))
    x = inputs()
    out = model(**x)
    x["history"][..., 1] += 30
    after = model(**x)
    others = [i for i in range(N) if i != 1]
    torch.testing.assert_close(out[..., others], after[..., others], atol=1e-4, rtol=1e-6)
    assert not torch.allclose(out[..., 1], after[..., 1], atol=1e-2)


def test_dead_sensors_are_no_keys():
    x = inputs()
    x["history_seen"][:, :, 2] = False
    model = build("staeformer", mask_dead=True)
    out = model(**x)
    with torch.no_grad():
        model.adaptive[:, 2] += 5  # what the dead sensor says must not matter to the others
    after = model(**x)
    others = [i for i in range(N) if i != 2]
    torch.testing.assert_close(out[..., others], after[..., others])
    assert build("gman", mask_dead=True)(**x).isfinite().all()


def group(nodes, size, dim=8, heads=2, **options):
    slot = get_model("gman").slots(group_size=size or -1)["spatial"]
    factory = resolve_slots({"spatial": slot}, {"name": "softmax"})["spatial"]
    return GroupAttention(factory, dim, heads, num_nodes=nodes, group_size=size, **options)


def test_group_attention_by_hand():
    module = group(7, 3)
    x = torch.randn(2, 7, 8)
    got = module(x)
    order, wanted = module.order, torch.zeros(2, 7, 8)
    groups = [order[0:3], order[3:6], order[6:7]]
    tops = module.between(torch.stack([x[:, g].amax(1) for g in groups], 1))
    for i, members in enumerate(groups):
        wanted[:, members] = module.within(x[:, members]) + tops[:, i : i + 1]
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(group(7, 7).order.sort().values, torch.arange(7))


def test_group_attention_masks_nodes_and_checks_size():
    module = group(7, 3)
    x = torch.randn(2, 7, 8)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 4] = False
    changed = x.clone()
    changed[:, 4] += 9
    keep = [0, 1, 2, 3, 5, 6]
    torch.testing.assert_close(module(x, key_mask=mask)[:, keep], module(changed, key_mask=mask)[:, keep])
    with pytest.raises(ConfigError, match="built for 7 nodes, got 6"):
        module(x[:, :6])
    with pytest.raises(ConfigError, match="group_size=9"):
        group(7, 9)
    assert build("gman", group_size=-1)(**inputs()).isfinite().all()


def test_groups_beside_values_from_features_alone():
    """The paper's size: the temporal attention takes values of its own while the groups take theirs from the joint input."""
    model = build("gman", size="paper", group_size=-1, depth=1, num_heads=2, embedding="learned")
    assert model(**inputs()).isfinite().all()


def test_group_size_minimises_pairs_and_grows_as_four_thirds():
    def pairs(nodes, size):
        return nodes * size + (nodes / size) ** 2

    for nodes in (100, 883, 3000):
        best = min(range(1, nodes + 1), key=lambda size: pairs(nodes, size))
        assert abs(best_group_size(nodes) - best) <= 1
    nodes = np.array([100, 300, 1000, 3000])
    cost = [pairs(n, best_group_size(n)) for n in nodes]
    slope = np.polyfit(np.log(nodes), np.log(cost), 1)[0]
    assert slope == pytest.approx(4 / 3, abs=0.03)
    assert cost[-1] == pytest.approx(1.5 * 2 ** (1 / 3) * 3000 ** (4 / 3), rel=0.02)


def test_graph_embeddings_know_neighbours():
    graph = torch.block_diag(torch.ones(5, 5), torch.ones(5, 5))
    graph[0, 5] = graph[5, 0] = 0.1
    vectors = laplacian_eigenvectors(graph, 4)
    side = vectors[:, 1].sign()
    assert (side[:5] == side[0]).all() and (side[5:] == side[5]).all() and side[0] != side[5]
    assert laplacian_eigenvectors(graph, 12).shape == (10, 12)
    walked = node2vec(graph, 8, walks=10, length=10, epochs=20)
    similar = nn.functional.normalize(walked, dim=1) @ nn.functional.normalize(walked, dim=1).T
    inside = (similar[:5, :5].sum() - 5) / 20
    assert inside > similar[:5, 5:].mean() + 0.2
    torch.testing.assert_close(walked, node2vec(graph, 8, walks=10, length=10, epochs=20))


@pytest.mark.parametrize("kind", ["slot", "additive"])
def test_segment_dropout_masks_the_softmax(kind):
    slot = get_model("tgatv2").slots()["temporal"]
    factory = resolve_slots({"temporal": slot}, {"name": "softmax"})["temporal"] if kind == "slot" else None
    module = SegmentAttention(8, 2, attention=factory, drop=0.9)
    x = torch.randn(4, 5, 8)
    keep = torch.tensor([[True, False, True, False, True]]).expand(4, -1)
    weights = module.weights(x, keep)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert (weights[:, [1, 3]] == 0).all()
    changed = x.clone()
    changed[:, 1] = 100
    torch.testing.assert_close(module(x, keep), module(changed, keep))
    draws = torch.stack([module.train().keep(64, 5, x.device) for _ in range(20)])
    assert draws.any(-1).all() and 0.1 < draws.float().mean() < 0.4
    assert module.eval().keep(4, 5, x.device) is None


def test_classifier_finds_the_planted_segment():
    """A motif (two linked nodes up together) in one random segment decides the class; the weights should peak there."""
    rng = torch.Generator().manual_seed(0)
    count, steps, nodes = 256, 6, 5
    graph = ring(nodes)
    x = torch.randn(count, steps, nodes, 2, generator=rng) * 0.3
    label = torch.randint(2, (count,), generator=rng)
    place = torch.randint(steps, (count,), generator=rng)
    rows = torch.arange(count)
    x[rows, place, :2, 0] += 3.0
    x[rows, place, :2, 1] += 3.0 * (2 * label[:, None] - 1)
    torch.manual_seed(0)
    model = TemporalGraphClassifier(2, 2, dim=16, num_heads=2, temporal_dropout=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    edges = edges_of(graph)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:192], edges), label[:192]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[192:], edges).argmax(1) == label[192:]).float().mean()
        peak = model.time.weights(model.segments(x[192:], edges)).argmax(1)
    assert accuracy > 0.9
    assert (peak == place[192:]).float().mean() > 0.8


def test_bad_options_say_so():
    with pytest.raises(ConfigError, match="patch_steps=5 must divide history_steps=12"):
        build("staeformer", patch_steps=5)
    with pytest.raises(ConfigError, match="exclude each other"):
        build("gman", group_size=2, graph="mask")
    with pytest.raises(ConfigError, match="'laplacian'"):
        build("gman", embedding="laplacan")
    with pytest.raises(CapabilityError, match="full bias"):
        factories("staeformer", {"graph": "bias", "size": "micro"}, attention="linear")


def test_many_short_sequences_are_one_flat_batch():
    """Temporal attention of 200 sensors in 8 windows: 1,600 sequences of 12 in one call."""
    model = build("gman", lag_steps=[])
    seen = []
    hook = lambda m, args, kwargs: seen.append(args[0].shape)
    model.encoder[0].temporal.register_forward_pre_hook(hook, with_kwargs=True)
    model(**inputs(looks=0))
    assert seen == [torch.Size([3 * N, P, 64])]


def test_the_step_head_can_hand_a_look_through():
    """Last week's distance from the profile, straight to the forecast of its step: last week's reading."""
    model = build("staeformer", step_dim=8)
    x = inputs()
    features = model.scaler.known_features
    with torch.no_grad():
        for weight in (model.head.weight, model.head.bias, model.step_head.out):
            weight.zero_()
        # z-score, distance, seen of lag 24; then those of lag 168.
        model.step_head.direct.zero_()[..., 4] = 1.0
        found = model(**x)
    week, seen = x["known"][:, 1], x["known_seen"][:, 1]
    torch.testing.assert_close(found[seen], week[seen], rtol=1e-4, atol=1e-3)
    assert model.step_head.direct.shape == (Q, 1, features)
    assert build("staeformer", step_dim=8, lag_steps=[]).step_head is None
