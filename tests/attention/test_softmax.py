"""Softmax attention with sinks, bounded scores and normalised queries and keys."""

import pytest
import torch
from variants import build, inputs, make, qkv

from kernels import softmax as kernel
from zoo.attention import Pattern
from zoo.errors import ConfigError


def with_extra_key(q, k, v, logit, value=None):
    """Softmax over the keys and one more, whose score is `logit` [.., N]."""
    scores = torch.cat((q @ k.mT * q.shape[-1] ** -0.5, logit.expand(*q.shape[:3])[..., None]), -1)
    value = torch.zeros_like(v[:, :, :1]) if value is None else value.expand(*v.shape[:2], 1, -1)
    return scores.softmax(-1) @ torch.cat((v, value), 2)


@pytest.mark.parametrize("sink", ["off_by_one", "zero_kv", "learned", "token"])
def test_sinks_are_one_more_key(sink):
    q, k, v = qkv()
    module = make("softmax", sink=sink)
    logit, value = torch.zeros(1, 1, 1).double(), None
    with torch.no_grad():
        if sink == "learned":
            module.sink_logit.normal_()
            logit = module.sink_logit[:, None]
        if sink == "token":
            module.sink_key.normal_()
            module.sink_value.normal_()
            logit = (q @ module.sink_key[..., None])[..., 0] * 6**-0.5
            value = module.sink_value[:, None]
        have = module.attend(q, k, v)
        assert (have - with_extra_key(q, k, v, logit, value)).abs().max() < 1e-12
        assert module.weights(q, k).sum(-1).max() < 1


def test_a_sink_far_down_is_softmax_and_takes_all_of_an_empty_row():
    q, k, v = qkv()
    module = make("softmax", sink="learned")
    torch.nn.init.constant_(module.sink_logit, -60.0)
    assert (module.attend(q, k, v) - kernel.attention(q, k, v)).abs().max() < 1e-12
    token = make("softmax", sink="token")
    torch.nn.init.normal_(token.sink_value)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    assert token.attend(q, k, v, key_mask=mask).abs().max() == 0


def test_gradients_reach_the_sinks():
    q, k, v = qkv(n=3, m=4)
    for sink in ("learned", "token"):
        module = make("softmax", sink=sink, higher_order=True)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        names = [n for n, _ in module.named_parameters() if n.startswith("sink")]
        leaves = [module.get_parameter(n) for n in names]

        def call(*values, module=module, names=names):
            shifted = dict(zip(names, values, strict=True))
            return torch.func.functional_call(
                _Attend(module), {f"inner.{n}": t for n, t in shifted.items()}, (q, k, v)
            )

        assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


class _Attend(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *tensors):
        return self.inner.attend(*tensors)


def test_softcap_bounds_the_scores():
    q, k, v = qkv()
    module = make("softmax", softcap=2.0)
    scores = 2 * torch.tanh(20 * q @ k.mT * 6**-0.5 / 2)
    assert (module.attend(20 * q, k, v) - scores.softmax(-1) @ v).abs().max() < 1e-12
    assert (make("softmax", softcap=1e5).attend(q, k, v) - kernel.attention(q, k, v)).abs().max() < 1e-8


@pytest.mark.parametrize("pattern", ["causal_self", "cross"])
@pytest.mark.parametrize("options", [{"sink": "token", "softcap": 3.0}, {"sink": "learned", "qk_norm": True}])
def test_options_decode_alike(pattern, options):
    module = build("softmax", Pattern(pattern), **options)
    arguments = inputs(Pattern(pattern))
    with torch.no_grad():
        state = module.init_state(2, **({"context": arguments[1]} if pattern == "cross" else {}))
        rows = []
        for t in range(7):
            y, state = module.step(arguments[0][:, t : t + 1], state)
            rows.append(y)
        assert (torch.cat(rows, 1) - module(*arguments)).abs().max() < 1e-5


def test_softmax_options_that_cannot_be():
    with pytest.raises(ConfigError, match="none, token"):
        make("softmax", sink="drain")
    with pytest.raises(ConfigError, match="positive"):
        make("softmax", softcap=0.0)
