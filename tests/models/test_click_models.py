"""DARE, DIN, SIM, ETA, TWIN, SDIM: padding, search, separate tables, serving split."""

import pytest
import torch

from zoo.attention import list_attention
from zoo.attention.slots import resolve_slots
from zoo.errors import ConfigError, ZooError
from zoo.models._ctr_tables import LONG
from zoo.models.registry import build_model, model_slots

MODELS = ("dare", "din", "sim", "eta", "twin", "sdim")


def make(name: str, attention: str = "softmax", **options):
    options = {"num_items": 50, "num_categories": 6, "max_length": 30, "width": 4, "hidden": (8,), **options}
    factories = resolve_slots(model_slots(name, **options), {"name": attention}, task="ctr")
    torch.manual_seed(2)
    return build_model(name, attention=factories, **options).eval()


def batch(rows: int = 3, length: int = 30):
    draw = torch.Generator().manual_seed(5)
    items = torch.randint(1, 51, (rows, length), generator=draw)
    categories = items % 6 + 1
    item = torch.randint(1, 51, (rows,), generator=draw)
    return item, item % 6 + 1, items, categories


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name: str) -> None:
    model = make(name)
    item, category, items, categories = batch(length=9)
    pad = torch.zeros(3, 21, dtype=torch.long)
    short = model(item, category, items, categories)["logit"]
    long = model(item, category, torch.cat((pad, items), 1), torch.cat((pad, categories), 1))["logit"]
    torch.testing.assert_close(long, short)


@pytest.mark.parametrize("name", MODELS)
def test_empty_history_is_finite(name: str) -> None:
    model = make(name).train()
    item, category, items, categories = batch()
    items, categories = items.clone(), categories.clone()
    items[1], categories[1] = 0, 0
    out = model(item, category, items, categories)
    sum(value.sum() for value in out.values()).backward()
    assert out["logit"].isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["dare", "eta", "twin"])
def test_search_of_everything_equals_no_search(name: str) -> None:
    searched, plain = make(name, top_k=29), make(name, top_k=0)
    plain.load_state_dict(searched.state_dict())
    inputs = [t[:, -29:] if t.dim() == 2 else t for t in batch()]
    torch.testing.assert_close(searched(*inputs)["logit"], plain(*inputs)["logit"])


@pytest.mark.parametrize("name", ["dare", "twin"])
def test_search_keeps_the_largest_attention_scores(name: str) -> None:
    model = make(name, top_k=5)
    inputs = batch()
    place, real = model.search(*inputs)
    scores = model.search_scores(*inputs)
    expected = scores.topk(5, 1).indices.sort(1).values
    assert torch.equal(place, expected) and real.all()
    if name == "dare":  # the score is the one of the slot's attention: same softmax over all behaviours
        item, category, items, categories = inputs
        zero, ages = model._ages(items)
        query = model.compare(item, category, zero) * model.target.scale
        attn = model.target.attn.attention_map(
            query[:, None],
            model.compare(items, categories, ages),
            model.represent(items, categories, ages),
        )
        torch.testing.assert_close(attn[:, 0, 0], scores.softmax(1))


def test_long_histories_are_scored_like_short_ones() -> None:
    model = make("dare", max_length=2 * LONG // 4)
    item, category, items, categories = inputs = batch(rows=2, length=model.max_length)
    with torch.no_grad():
        one_by_one = model.search_scores(*inputs)
        ages = torch.arange(model.max_length, 0, -1)[None]
        keys = model.compare(items, categories, ages)
        expected = model.target.scores(model.compare(item, category, torch.zeros_like(item)), keys)
    torch.testing.assert_close(one_by_one, expected)
    torch.testing.assert_close(model.search_scores(*inputs).detach(), one_by_one)


def test_narrow_keys_start_with_the_same_softmax() -> None:
    wide, narrow = (make("dare", width=8, attention_width=w).target for w in (8, 4))
    aligned = [
        torch.full((1, 3 * w), 0.3) for w in (8, 4)
    ]  # as trained: every number as large, whatever the width
    scores = [t.scores(q, q[:, None]) for t, q in zip((wide, narrow), aligned, strict=True)]
    torch.testing.assert_close(*scores)
    mixed = [torch.eye(3 * w)[:1] * 6 for w in (8, 4)]
    for target, q in zip((wide, narrow), mixed, strict=True):  # scores are those that the mechanism weighs by
        keys, values = torch.cat((q, 0 * q))[None], torch.tensor([[1.0], [0.0]]).expand(1, 2, 24)
        weight = target(q, keys, values, torch.ones(1, 2, dtype=torch.bool))[0, 0]
        assert float(weight) == pytest.approx(float(target.scores(q, keys)[0].softmax(0)[0]))


def test_search_with_fewer_real_behaviours_than_k_stays_masked() -> None:
    model = make("dare", top_k=20)
    item, category, items, categories = batch()
    items, categories = items.clone(), categories.clone()
    items[:, :26], categories[:, :26] = 0, 0
    _, real = model.search(item, category, items, categories)
    assert real.sum(1).tolist() == [4, 4, 4]


def test_hard_search_keeps_the_latest_of_the_category() -> None:
    model = make("sim", search="hard", top_k=3)
    item, category, items, categories = batch()
    place, real = model.search(item, category, items, categories)
    for row in range(3):
        same = (categories[row] == category[row]).nonzero().flatten()[-3:]
        assert place[row][real[row]].tolist() == same.tolist()


def test_equal_distances_of_eta_go_to_the_later_behaviour() -> None:
    model = make("eta", top_k=5, hash_bits=4)
    item, category, items, categories = batch(length=20)
    pad = torch.zeros(3, 10, dtype=torch.long)
    short = model.search(item, category, items, categories)[0]
    long = model.search(item, category, torch.cat((pad, items), 1), torch.cat((pad, categories), 1))[0]
    assert torch.equal(long - 10, short)
    scores = torch.tensor([[2.0, 4, 2, 2, float("-inf")]])
    place, found = model.select(scores, 3)
    assert place.tolist() == [[1, 2, 3]] and found.all()


def test_eta_distance_is_that_of_the_codes() -> None:
    model = make("eta")
    item, category, items, categories = batch()
    zero, ages = model._ages(items)
    own, theirs = model.codes(item, category, zero), model.codes(items, categories, ages)
    hamming = (own[:, None] != theirs).sum(-1)
    torch.testing.assert_close(model.search_scores(item, category, items, categories), 64.0 - 2 * hamming)


def test_dare_keeps_its_two_tables_apart() -> None:
    model = make("dare", attention_width=2, top_k=0).train()
    item, category, items, categories = batch()
    _, ages = model._ages(items)
    r, o = model.aggregate(item, category, items, categories, ages, items > 0)
    r.sum().backward(retain_graph=True)
    assert model.compare.item.weight.grad is None
    assert model.compare.width == 2 and o.shape == r.shape == (3, 12)
    auxiliary = model(item, category, items, categories)["auxiliary"]
    auxiliary.sum().backward()
    assert model.compare.item.weight.grad.abs().max() > 0  # stage 1 teaches the search
    assert "auxiliary" not in model.eval()(item, category, items, categories)


def test_training_and_serving_of_dare_agree() -> None:
    model = make("dare", top_k=5)
    inputs = batch()
    served = model(*inputs)["logit"]
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    torch.testing.assert_close(model(*inputs)["logit"], served)


def test_sdim_scores_are_shares_of_the_shared_buckets() -> None:
    model = make("sdim", hashes=12, bits=2)
    item, category, items, categories = batch(length=8)
    items[0, -1], categories[0, -1] = item[0], category[0]
    scores = model.search_scores(item, category, items, categories)
    zero, ages = model._ages(items)
    own, theirs = model.represent(item, category, zero), model.represent(items, categories, ages)
    for b, m in ((0, 7), (1, 2), (2, 5)):
        codes = model.long.signatures(torch.stack((own[b], theirs[b, m]))[None, None])[0, 0]
        assert float(scores[b, m]) == pytest.approx(float((codes[0] == codes[1]).float().mean()))


def test_sdim_table_serves_every_candidate() -> None:
    model = make("sdim")
    item, category, items, categories = batch(rows=1)
    table = model.user_table(items, categories)
    parts = model.user_table(items[:, -1:], categories[:, -1:])
    assert parts.shape == table.shape == (1, 1, 16, 8, 12)
    zero, ages = model._ages(items)
    candidate, expected = model.aggregate(item, category, items, categories, ages, items > 0)
    events = model.represent(items, categories, ages)
    direct = model.long.attend(candidate[:, None, None], events[:, None], events[:, None])[:, 0, 0]
    torch.testing.assert_close(model.long.read(candidate[:, None, None], table)[:, 0, 0], direct)


def test_activation_unit_of_din_is_not_a_softmax() -> None:
    model = make("din", unit="mlp")
    item, category, items, categories = batch()
    twice = [torch.cat((t, t), 1)[:, :30] if t.dim() == 2 else t for t in (items[:, :15], categories[:, :15])]
    out = model(item, category, *twice)["logit"]
    assert out.isfinite().all() and model.search_scores(item, category, items, categories).shape == (3, 30)
    with pytest.raises(ConfigError, match="did you mean 'mlp'"):
        make("din", unit="mpl")


@pytest.mark.parametrize("attention", list_attention())
@pytest.mark.parametrize("name", ["dare", "din", "twin", "sdim"])
def test_every_attention_trains_or_says_why_not(name: str, attention: str) -> None:
    try:
        model = make(name, attention).train()
    except ZooError as error:
        assert "Variants that fit" in str(error) or attention in str(error)
        return
    out = model(*batch())
    sum(value.sum() for value in out.values()).backward()
    assert out["logit"].isfinite().all() and model.represent.item.weight.grad.isfinite().all()


def test_wrong_settings_name_the_rule() -> None:
    with pytest.raises(ConfigError, match="give the latest ones"):
        make("dare")(*batch(length=31))
    with pytest.raises(ConfigError, match="multiple of"):
        make("sdim", hashes=7)
    with pytest.raises(ConfigError, match="must divide"):
        make("din", num_heads=5)
    with pytest.raises(ConfigError, match="did you mean 'hard'"):
        make("sim", search="hrd")
