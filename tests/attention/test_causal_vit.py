"""Causal ViT: softmax at the beginning of its schedule, causal attention at the end."""

import torch
from variants import build, inputs, make, qkv

from kernels import softmax as kernel
from zoo.attention import Grid, Pattern, create_attention


def test_causal_vit_ends():
    q, k, v = qkv()
    module = make("causal_vit", anneal_steps=9)
    module.passes.fill_(-1)
    assert module.softness == 1.0
    assert (module.attend(q, k, v) - kernel.attention(q, k, v)).abs().max() < 1e-12
    causal = kernel.attention(q, k, v, causal=True)
    pre = make("causal_vit", mask_site="pre", anneal_steps=0)
    assert (pre.attend(q, k, v) - causal).abs().max() < 1e-12
    post = make("causal_vit", anneal_steps=0)
    _, part = kernel.attention(q, k, v, causal=True, return_lse=True)
    _, total = kernel.attention(q, k, v, return_lse=True)
    share = (part - total).exp()
    assert (post.weights(q, k).sum(-1) - share).abs().max() < 1e-12
    assert (post.attend(q, k, v) - share[..., None] * causal).abs().max() < 1e-12
    for site in ("pre", "post"):
        half = make("causal_vit", mask_site=site, anneal_steps=1)
        soft = torch.where(torch.ones(11, 11).tril().bool(), 1.0, 0.5).double()
        p = (q @ k.mT * 6**-0.5).exp()
        want = p * soft / (p * soft if site == "pre" else p).sum(-1, keepdim=True)
        assert (half.weights(q, k) - want).abs().max() < 1e-12


def test_causal_vit_schedule_and_class_token_last():
    module = create_attention("causal_vit", 24, 4, pattern="self", anneal_steps=4, grid=Grid((2, 3), 1))
    x, seen = torch.randn(2, 7, 24), []
    for _ in range(5):
        seen.append(round(module.softness, 3))
        module.train()(x)
    module.eval()(x)
    assert seen == [0.8, 0.6, 0.4, 0.2, 0.0] and int(module.passes) == 5
    weights = module.attention_map(x)
    assert (weights[:, :, 0] > 0).all()  # the class token sees every patch
    assert weights[:, :, 1:, 0].max() == 0 and weights[:, :, 1, 2:].max() == 0
    pre = create_attention(
        "causal_vit", 24, 4, pattern="self", anneal_steps=0, mask_site="pre", grid=Grid((2, 3), 1)
    )
    assert (pre.attention_map(x)[:, :, 0] > 0).all()


def test_strictly_causal_with_the_mask_before_the_softmax():
    module = build("causal_vit", Pattern.CAUSAL_SELF, mask_site="pre")
    (x,) = inputs(Pattern.CAUSAL_SELF)
    other = x.clone()
    other[:, 4:] = 0.0
    assert (module(x) - module(other))[:, :4].abs().max() < 1e-6
