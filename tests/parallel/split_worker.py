"""One process of the sequence-parallel tests: compares its part with the whole sequence computed alone.

Arguments: rank, world size, a file for the rendezvous. Prints one line per check; exits non-zero at the first failure.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels import decay, delta, linear, softmax
from zoo import create_attention, parallel
from zoo.errors import CapabilityError

B, H, D, E = 2, 3, 5, 4


def tensors(length, *widths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, length, w, generator=draw, dtype=torch.float64) for w in widths]


def part(x, rank, world, dim=2):
    return x.chunk(world, dim)[rank]


def compare(name, whole, split, inputs, key_mask, rank, world):
    """Outputs, and gradients of a loss whose upstream differs at every place."""
    inputs = [x.requires_grad_() for x in inputs]
    expected = whole(*inputs, key_mask=key_mask)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    own = [part(x.detach(), rank, world).requires_grad_() for x in inputs]
    mask = None if key_mask is None else part(key_mask, rank, world, 1)
    found = split(*own, key_mask=mask)
    torch.testing.assert_close(found, part(expected, rank, world), rtol=1e-9, atol=1e-11, msg=name)
    gradients = torch.autograd.grad(found, own, part(upstream, rank, world))
    for g, w in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(g, part(w, rank, world), rtol=1e-9, atol=1e-11, msg=f"gradient of {name}")
    print(name, flush=True)


def operations(rank, world):
    length = 24
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[0, : length // world] = False  # a whole part masked
    for key_mask in (None, mask):
        q, k, v = tensors(length, D, D, E)
        for causal in (False, True):
            for name, op, own, options in [
                ("linear", linear.linear_attention, parallel.linear_attention, {}),
                ("linear raw", linear.linear_attention, parallel.linear_attention, {"normalize": "none"}),
                ("mala", linear.mala, parallel.mala, {}),
                ("mala sum", linear.mala, parallel.mala, {"key_norm": "sum"}),
                ("softmax", softmax.attention, parallel.softmax_attention, {}),
            ]:
                one = lambda *a, op=op, o=options, c=causal, **m: op(*a, causal=c, **o, **m)
                two = lambda *a, op=own, o=options, c=causal, **m: op(*a, causal=c, **o, **m)
                compare(f"{name} causal={causal}", one, two, [q, k, v], key_mask, rank, world)
        scalar, vector = (F.logsigmoid(t) for t in tensors(length, 1, D, seed=5))
        gates = {"none": [], "scalar": [scalar.squeeze(-1).detach()], "vector": [vector.detach()]}
        beta = torch.sigmoid(scalar.squeeze(-1)).detach()
        plain = [x.detach() for x in (q, k, v)]
        positive = [plain[0].exp(), plain[1].exp(), plain[2]]  # no vanishing denominators
        unit = [plain[0], F.normalize(plain[1], dim=-1), plain[2]]
        for name, gate in gates.items():
            for normalizer in ("none", "denom"):
                pair = [gated(op, normalizer=normalizer) for op in (decay.decay_scan, parallel.decay_scan)]
                compare(f"decay {name} {normalizer}", *pair, [*positive, *gate], key_mask, rank, world)
            pair = [gated_delta(op) for op in (delta.delta_scan, parallel.delta_scan)]
            compare(f"delta {name}", *pair, [*unit, beta, *gate], key_mask, rank, world)


def gated(op, **options):
    return lambda q, k, v, g=None, **call: op(q, k, v, log_g=g, **options, **call)


def gated_delta(op):
    return lambda q, k, v, beta, g=None, **call: op(q, k, v, beta, log_g=g, **call)


def uneven(rank, world):
    """States do not care how long a part is; softmax says what to do."""
    q, k, v = tensors(19, D, D, E)
    sizes = [19 - 5 * (world - 1), *[5] * (world - 1)]
    own = [x.split(sizes, 2)[rank] for x in (q, k, v)]
    wanted = linear.mala(q, k, v, causal=True).split(sizes, 2)[rank]
    torch.testing.assert_close(parallel.mala(*own, causal=True), wanted, rtol=1e-9, atol=1e-11)
    try:
        parallel.softmax_attention(*own)
    except ValueError as error:
        assert "pad them" in str(error)
    else:
        raise AssertionError("parts of different length went through")
    print("uneven", flush=True)


def traffic(rank, world):
    """Bytes of forward and backward at two lengths: equal for states, proportional for softmax."""
    short, long = (sent_by(length, rank, world) for length in (8 * world, 32 * world))
    sent = {name: (short[name], long[name]) for name in short}
    for name in ("linear", "mala", "decay", "delta"):
        assert sent[name][0] == sent[name][1] and sent[name][0][0] > 0, (name, sent[name])
        assert sent[name][0][1] == 2, "one collective forward, one backward"
    # kv and ksum, and the count of keys, in float64, over W - 1 links, there and back
    assert sent["linear"][0][0] == 2 * (world - 1) * 8 * (B * H * (D * E + D) + B)
    assert sent["softmax"][1][0] == 4 * sent["softmax"][0][0]
    print("traffic", sent, flush=True)


def sent_by(length, rank, world):
    q, k, v = (part(x, rank, world).requires_grad_() for x in tensors(length, D, D, E))
    log_g = F.logsigmoid(q.detach())
    calls = {
        "linear": lambda: parallel.linear_attention(q, k, v, causal=True),
        "mala": lambda: parallel.mala(q, k, v),
        "decay": lambda: parallel.decay_scan(q, k, v, log_g=log_g),
        "delta": lambda: parallel.delta_scan(q, k, v, torch.sigmoid(log_g[..., 0])),
        "softmax": lambda: parallel.softmax_attention(q, k, v, causal=True),
    }
    found = {}
    for name, call in calls.items():
        with parallel.count_traffic() as counted:
            call().sum().backward()
        found[name] = (counted.bytes, counted.calls)
    return found


def double_backward(rank, world):
    """A gradient of a gradient crosses the processes as well."""
    q, k, v = tensors(4 * world, D, D, E)

    def penalty(q, k, v, attend, total):
        out = attend(q, k, v)
        (grad,) = torch.autograd.grad(out.square().sum(), k, create_graph=True)
        return torch.autograd.grad(total(grad.square().sum()), v)[0]

    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = penalty(*whole, linear.linear_attention, lambda x: x)
    own = [part(x, rank, world).clone().requires_grad_() for x in (q, k, v)]
    found = penalty(*own, parallel.linear_attention, lambda x: x)
    torch.testing.assert_close(found, part(wanted, rank, world), rtol=1e-8, atol=1e-10)
    print("double backward", flush=True)


class Stack(torch.nn.Module):
    def __init__(self, name, pattern, **options):
        super().__init__()
        make = lambda: create_attention(name, 12, 3, pattern=pattern, **options)
        self.attention = torch.nn.ModuleList([make(), make()])
        self.mlp = torch.nn.Sequential(
            torch.nn.LayerNorm(12), torch.nn.Linear(12, 12), torch.nn.GELU(), torch.nn.Linear(12, 12)
        )

    def forward(self, x):
        for attention in self.attention:
            x = x + attention(x)
            x = x + self.mlp(x)
        return x


def models(rank, world):
    """Two layers, all parameters' gradients, summed over processes as a trainer would."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8 * world, 12, generator=draw, dtype=torch.float64)
    for name, pattern, options in [
        ("softmax", "self", {}),
        ("softmax", "causal_self", {"num_kv_heads": 1}),
        ("linear", "self", {}),
        ("linear", "causal_self", {"normalize": "rmsnorm"}),
        ("mala", "causal_self", {"rope": "none", "lepe": "none"}),
        ("gla", "causal_self", {}),
        ("gdn", "causal_self", {"conv": 0}),
        ("kda", "causal_self", {"conv": 0}),
    ]:
        torch.manual_seed(2)
        model = Stack(name, pattern, **options).double()
        expected = model(x)
        expected.square().sum().backward()
        wanted = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        parallel.split_sequence(model)
        found = model(part(x, rank, world, 1))
        torch.testing.assert_close(
            found, part(expected, rank, world, 1), rtol=1e-6, atol=1e-8, msg=f"{name} {pattern}"
        )
        found.square().sum().backward()
        for parameter, want in zip(model.parameters(), wanted, strict=True):
            dist.all_reduce(parameter.grad)
            # gates of recurrences are computed in float32
            torch.testing.assert_close(
                parameter.grad, want, rtol=1e-4, atol=1e-5, msg=f"{name} {pattern} gradient"
            )
        print("model", name, pattern, flush=True)
    for name, options in (("mala", {}), ("gdn", {}), ("neighborhood", {})):
        try:
            parallel.split_sequence(create_attention(name, 12, 3, pattern="causal_self", **options))
        except CapabilityError as error:
            assert "cannot be split" in str(error)
        else:
            raise AssertionError(f"{name} was split although tokens at the border need their neighbours")


if __name__ == "__main__":
    rank, world, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    for check in (operations, uneven, traffic, double_backward, models):
        check(rank, world)
    dist.destroy_process_group()
