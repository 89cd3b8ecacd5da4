"""SASRec, BERT4Rec and HSTU: padding, causality, user states, serving."""

import pytest
import torch

from zoo.attention import list_attention
from zoo.attention.slots import resolve_slots
from zoo.bench.peers_recommendation import windows
from zoo.bench.peers_recommendation_epoch import prefixes
from zoo.errors import ConfigError, ZooError
from zoo.models.registry import build_model, model_slots
from zoo.predict._serving import blocked_top_k, pad_left

NEXT = ("sasrec", "hstu")
MODELS = (*NEXT, "bert4rec")


def make(name: str, attention: str = "softmax", **options):
    options = {"num_items": 30, "max_length": 8, "dim": 16, "dropout": 0.0, **options}
    factories = resolve_slots(model_slots(name, **options), {"name": attention}, task="recommendation")
    torch.manual_seed(3)
    model = build_model(name, attention=factories, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases would hide what they do
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.items.weight[0].zero_()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_length_of_the_padding_does_not_matter(name: str) -> None:
    model = make(name, position="recency")
    items = torch.tensor([[4, 9, 2]])
    padded = pad_left([[4, 9, 2]], 7)
    if name == "hstu" or name == "sasrec":
        torch.testing.assert_close(model.encode(padded)[:, -3:], model.encode(items))
    torch.testing.assert_close(model.user_vector(padded), model.user_vector(items))


@pytest.mark.parametrize("name", MODELS)
def test_empty_history_is_finite_and_alike(name: str) -> None:
    model = make(name)
    users = model.user_vector(torch.zeros(3, 8, dtype=torch.long))
    assert users.isfinite().all()
    torch.testing.assert_close(users[0], users[2])
    items = torch.tensor([[0] * 8, [0] * 5 + [3, 1, 2]])
    torch.testing.assert_close(model.user_vector(items)[:1], users[:1])
    model.train()(items).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.items.weight.grad[0].abs().max() == 0


@pytest.mark.parametrize("name", NEXT)
def test_later_items_do_not_change_earlier_outputs(name: str) -> None:
    model = make(name)
    items = torch.randint(1, 31, (2, 8))
    changed = items.clone()
    changed[:, 5:] = torch.randint(1, 31, (2, 3))
    times = -torch.arange(7.0, -1, -1).expand(2, 8) * 50
    before, after = model(items, times), model(changed, times)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-3


def test_bert4rec_sees_both_sides_and_predicts_at_a_mask() -> None:
    model = make("bert4rec")
    items = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    hidden = items.clone()
    hidden[0, 3] = model.mask_token
    changed = hidden.clone()
    changed[0, 6] = 20
    assert (model(hidden)[0, 3] - model(changed)[0, 3]).abs().max() > 1e-3
    shifted = torch.cat((items[:, 1:], torch.tensor([[model.mask_token]])), 1)
    torch.testing.assert_close(model.user_vector(items), model(shifted)[:, -1])


def test_hstu_uses_times() -> None:
    model = make("hstu", "hstu")
    items = torch.randint(1, 31, (1, 8))
    near, far = torch.zeros(1, 8), -torch.arange(7.0, -1, -1)[None] * 1e5
    assert (model(items, near) - model(items, far))[:, -1].abs().max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_inner_products_with_the_input_table(name: str) -> None:
    model = make(name)
    users = torch.randn(2, 16)
    expected = users @ model.items.weight[1:31].T + model.item_bias
    torch.testing.assert_close(model.scores(users), expected)


@pytest.mark.parametrize("position", ["order", "none"])
@pytest.mark.parametrize(
    "attention", [n for n in ("softmax", "linear", "mala", "gdn", "sdim") if n in list_attention()]
)
@torch.no_grad()
def test_user_state_equals_the_whole_history(attention: str, position: str) -> None:
    model = make("sasrec", attention, position=position)
    histories = torch.randint(1, 31, (2, 11))
    state = model.init_state(2)
    for count, items in enumerate(histories.unbind(1), 1):
        users, state = model.step(items, state)
        full = model.user_vector(histories[:, :count][:, -8:])
        torch.testing.assert_close(users, full, atol=2e-5, rtol=1e-4)


def test_positions_that_shift_with_every_event_have_no_user_state() -> None:
    with pytest.raises(ConfigError, match="model.position=order"):
        make("sasrec", position="recency").init_state(1)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocked_top_k_equals_a_full_sort(block: int) -> None:
    users, table, bias = torch.randn(5, 4), torch.randint(-1, 2, (40, 4)).float(), torch.zeros(40)
    excluded = torch.tensor([[0, 39, -1]]).expand(5, 3)
    users = users.round()  # many equal scores
    scores = users @ table.T
    scores[:, [0, 39]] = float("-inf")
    expected, order = scores.sort(dim=1, descending=True, stable=True)
    found, items = blocked_top_k(users, table, bias, 10, excluded=excluded, block_items=block)
    assert torch.equal(found, expected[:, :10]) and torch.equal(items, order[:, :10])


def test_blocked_top_k_refuses_impossible_lengths() -> None:
    with pytest.raises(ConfigError, match="between 1 and the 3 items"):
        blocked_top_k(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(3), 4)


def test_wrong_settings_name_the_rule() -> None:
    with pytest.raises(ConfigError, match="did you mean 'recency'"):
        make("sasrec", position="recent")
    with pytest.raises(ConfigError, match="give the latest ones"):
        make("sasrec")(torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ZooError, match="must divide dim"):
        make("sasrec", num_heads=3)


@pytest.mark.parametrize("attention", list_attention())
@pytest.mark.parametrize("name", MODELS)
def test_every_attention_trains_or_says_why_not(name: str, attention: str) -> None:
    options = {"relative_bias": False} if name == "hstu" else {}
    try:
        model = make(name, attention, **options).train()
    except ZooError as error:
        assert "Variants that fit" in str(error) or attention in str(error)
        return
    items = pad_left([[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], []], 8)
    out = model(items, torch.zeros(items.shape))
    out[items > 0].square().sum().backward()
    assert out[items > 0].isfinite().all()
    assert model.items.weight.grad.isfinite().all() and model.items.weight.grad.abs().max() > 0


def test_every_prefix_of_the_bench_is_one_question() -> None:
    items, targets = (t[:6] for t in windows())
    history, last = prefixes(items, targets)
    asked = [(b, t) for b in range(6) for t in range(items.shape[1]) if targets[b, t] > 0]
    assert len(history) == len(asked) and int((last > 0).sum()) == len(asked)
    for row, answer, (b, t) in zip(history, last[:, -1], asked, strict=True):
        seen = items[b, : t + 1]
        assert row[-len(seen) :].tolist() == seen.tolist() and not row[: -len(seen)].any()
        assert answer == targets[b, t]
