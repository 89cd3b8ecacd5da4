"""Speech models: padding, caches, lengths, slots."""

import copy

import pytest
import torch

from zoo.attention.registry import get_attention, list_attention
from zoo.attention.slots import misfit, resolve_slots
from zoo.decoding import beam_search, greedy
from zoo.decoding.greedy import token_limit
from zoo.errors import CapabilityError, ConfigError
from zoo.models._speech import BOS
from zoo.models.registry import build_model, get_model, model_options

TINY = {
    "vocab_size": 15,
    "sample_rate": 8000,
    "n_mels": 20,
    "dim": 32,
    "num_heads": 2,
    "encoder_layers": 2,
    "stem_channels": 4,
}
MODELS = ("aed", "aed_shallow", "firered_aed", "ctc")


def make(name="aed", attention="softmax", **options):
    torch.manual_seed(0)
    options = {**TINY, **options}
    slots = get_model(name).slots(**options)
    model = build_model(name, resolve_slots(slots, {"name": attention}), **options)
    with torch.no_grad():  # sharpen the outputs, so that decoding has something to say
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def sound(*lengths):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(lengths), max(lengths), generator=generator) * 0.1, torch.tensor(lengths)


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name):
    """An utterance alone, in a padded batch, and with noise behind its end is encoded and decoded alike."""
    model = make(name)
    audio, lengths = sound(4000, 1777, 2901)
    memory, count = model.encode(audio, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone, own = model.encode(audio[i : i + 1, :n], lengths[i : i + 1])
        assert int(own) == int(count[i]) == alone.shape[1]
        torch.testing.assert_close(memory[i, : int(own)], alone[0], atol=2e-5, rtol=1e-4)
    if model.has_decoder:
        prefix = torch.randint(3, 15, (3, 6))
        logits = model.decode(prefix, memory, count)
        other = model.decode(prefix[1:2], *model.encode(audio[1:2, :1777], lengths[1:2]))
        torch.testing.assert_close(logits[1], other[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("stem", ["conv1d", "conv2d", "depthwise"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_length_formula(stem, factor):
    """Frames and tokens of every short utterance are as many as the formula says."""
    model = make(stem=stem, subsampling=factor, encoder_layers=1)
    for samples in [*range(1, 260, 3), 799, 800, 801, 1601]:
        audio, lengths = sound(samples)
        features, frames = model.front(audio, lengths)
        tokens, count = model.stem(features, frames)
        assert features.shape[1] == int(frames) == int(model.front.frames(lengths))
        assert tokens.shape[1] == int(count) == int(model.stem.lengths(frames))


def streaming_variants():
    names = set()
    for slot in ("decoder", "cross"):
        names |= {n for n in list_attention() if misfit(n, get_model("aed").slots()[slot]) is None}
    return sorted(names)


@pytest.mark.parametrize("attention", streaming_variants())
def test_steps_equal_whole(attention):
    """Step by step with caches or states equals the teacher-forced pass, for each variant that decodes."""
    try:
        model = make(attention=attention, decoder_layers=2)
    except CapabilityError as error:
        pytest.skip(str(error))
    memory, count = model.encode(*sound(2400, 1300))
    prefix = torch.randint(3, 15, (2, 9))
    prefix[:, 0] = BOS
    whole = model.decode(prefix, memory, count)
    state = model.init_state(memory, count)
    with torch.no_grad():
        for t in range(prefix.shape[1]):
            logits, state = model.step(prefix[:, t], state)
            torch.testing.assert_close(logits, whole[:, t], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("attention", streaming_variants())
def test_cached_greedy_equals_recomputation(attention):
    """The same sentences come out with and without states."""
    model = make(attention=attention)
    memory, count = model.encode(*sound(2400, 1300, 700))
    assert greedy(model, memory, count).tokens == greedy(model, memory, count, cached=False).tokens


@pytest.mark.parametrize("attention", list_attention(pattern="causal_cross"))
def test_wait_k_steps_equal_whole(attention):
    """With a limited view of the memory, steps equal the whole pass, and unseen places have no influence."""
    try:
        model = make(attention=attention, wait=2, wait_stride=1, label_positions=False)
    except CapabilityError as error:
        pytest.skip(str(error))
    if model.decoder[0].cross.name != attention:
        pytest.skip(f"{attention} takes no padded keys")
    memory, count = model.encode(*sound(2400, 1500))
    prefix = torch.randint(3, 15, (2, 7))
    whole = model.decode(prefix, memory, count)
    state = model.init_state(memory, count)
    for i in range(prefix.shape[1]):
        logits, state = model.step(prefix[:, i], state)
        torch.testing.assert_close(logits, whole[:, i], atol=2e-4, rtol=1e-3)
    other = memory.clone()
    other[:, 5:] += 1.0  # seen from token 4 on: 2 + 4 places
    changed = model.decode(prefix, other, count)
    torch.testing.assert_close(changed[:, :4], whole[:, :4], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(changed[:, 4:], whole[:, 4:], atol=1e-5)


def test_future_tokens_do_not_matter():
    model = make()
    memory, count = model.encode(*sound(2000))
    prefix = torch.randint(3, 15, (1, 8))
    changed = prefix.clone()
    changed[:, 5:] = 3
    a, b = model.decode(prefix, memory, count), model.decode(changed, memory, count)
    torch.testing.assert_close(a[:, :5], b[:, :5], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_batch_of_one_equals_batch_of_many():
    """Neighbours never change a hypothesis, greedy or beam."""
    model = make()
    audio, lengths = sound(3000, 1200, 2100)
    memory, count = model.encode(audio, lengths)
    for search in (greedy, lambda *a: beam_search(*a, beam=3, ctc_weight=0.3)):
        together = search(model, memory, count)
        for i, n in enumerate(lengths.tolist()):
            alone = search(model, *model.encode(audio[i : i + 1, :n], lengths[i : i + 1]))
            assert alone.tokens[0] == together.tokens[i]


@pytest.mark.parametrize("attention", streaming_variants())
def test_reordered_states(attention):
    """Duplicated and exchanged beams go on as their prefixes do."""
    from zoo.attention.base import reorder_state

    model = make(attention=attention)
    memory, count = model.encode(*sound(2400))
    rows = memory.expand(3, -1, -1).contiguous(), count.expand(3)
    prefix = torch.randint(3, 15, (3, 6))
    index = torch.tensor([2, 0, 2])
    with torch.no_grad():
        state = model.init_state(*rows)
        for t in range(4):
            _, state = model.step(prefix[:, t], state)
        state = reorder_state(state, index)
        after = torch.cat((prefix[index, :4], prefix[:, 4:]), 1)
        for t in (4, 5):
            logits, state = model.step(after[:, t], state)
        torch.testing.assert_close(logits, model.decode(after, *rows)[:, -1], atol=1e-4, rtol=1e-3)


def test_beam_of_one_is_greedy():
    model = make()
    memory, count = model.encode(*sound(3000, 1200))
    assert beam_search(model, memory, count, beam=1).tokens == greedy(model, memory, count).tokens


def test_a_decoder_without_end_is_cut():
    """At a quarter more labels than CTC heard and some to spare; without label positions at one a place and some to spare."""
    model, memory, lengths = make(), torch.zeros(2, 40, 32), torch.tensor([40, 10])
    model.labels_heard = lambda memory: torch.arange(1.0, 41).repeat(2, 1) / 2
    assert token_limit(model, memory, lengths).tolist() == [33, 15]
    assert token_limit(make(label_positions=False), memory, lengths).tolist() == [56, 26]
    model.step = lambda token, state: (torch.eye(15)[torch.full_like(token, 5)], state)  # says 5 for ever
    found = greedy(model, memory, lengths)
    assert [len(t) for t in found.tokens] == [33, 15] and bool(found.truncated.all())


def test_wider_beam_scores_no_worse():
    model = make()
    memory, count = model.encode(*sound(3000, 1200))
    narrow = beam_search(model, memory, count, beam=1).scores
    wide = beam_search(model, memory, count, beam=8).scores
    assert bool((wide >= narrow - 1e-5).all())


@pytest.mark.parametrize("options", [{}, {"ctc_weight": 0.3}, {"ctc_weight": 1.0, "length_penalty": 0.6}])
def test_beams_do_not_see_their_neighbours(options):
    """Every utterance gets the sentence and the score that it gets alone, however long its neighbours are."""
    model = make()
    memory, count = model.encode(*sound(3000, 1200, 2400))
    together = beam_search(model, memory, count, beam=3, **options)
    for i, n in enumerate(count.tolist()):
        alone = beam_search(model, memory[i : i + 1, :n], count[i : i + 1], beam=3, **options)
        assert alone.tokens[0] == together.tokens[i]
        torch.testing.assert_close(alone.scores[0], together.scores[i])


def test_few_candidates_are_those_that_the_decoder_likes():
    model = make()
    memory, count = model.encode(*sound(3000, 1200))
    everything = beam_search(model, memory, count, beam=3, candidates=model.vocab_size)
    assert beam_search(model, memory, count, beam=3, candidates=4).tokens == everything.tokens
    assert beam_search(model, memory, count, beam=3).tokens == everything.tokens


def test_relative_positions():
    """The bias is Transformer-XL's: equal to adding position vectors to the keys, offset by offset."""
    model = make("firered_aed", encoder_layers=1)
    block = model.encoder[0]
    assert model.position == "rel" and block.relative is not None
    x = torch.randn(1, 5, 32)
    bias = block.relative(x)
    from zoo.layers.position import sine_positions

    q, k, _ = block.attn.project(x, x, x)
    r = block.relative
    for i in range(5):
        for j in range(5):
            p = r.position(sine_positions(torch.tensor([i - j]), 32)).view(2, 16)
            expected = ((q[0, :, i] + r.position_bias) * p).sum(-1) + (r.content_bias * k[0, :, j]).sum(-1)
            torch.testing.assert_close(bias[0, :, i, j], expected / 4, atol=1e-5, rtol=1e-4)
    twin = copy.deepcopy(model)
    assert twin.encoder[0].relative.attention is twin.encoder[0].attn


@pytest.mark.parametrize("attention", list_attention(pattern="self", bias="full"))
def test_relative_positions_in_every_variant_that_takes_them(attention):
    """Made of plain queries and keys, whatever a variant appends to its own."""
    slots = get_model("firered_aed").slots(**TINY)
    if misfit(attention, slots["encoder"]) is not None:
        pytest.skip(f"{attention} does not fit the encoder")
    model = make("firered_aed", attention=attention, encoder_layers=1)
    assert model.position == "rel"
    memory, _ = model.encode(*sound(1600, 900))
    assert bool(memory.isfinite().all())
    block, x = model.encoder[0], torch.randn(1, 4, 32)
    if attention == "flash_bias":
        plain = make("firered_aed", encoder_layers=1).encoder[0]
        plain.load_state_dict(block.state_dict(), strict=False)
        torch.testing.assert_close(block.relative(x), plain.relative(x))


def test_relative_falls_back_to_sine_by_variant():
    names = [n for n in list_attention(pattern="self") if get_attention(n).capabilities.bias != "full"]
    slot = get_model("firered_aed").slots()["encoder"]
    name = next(n for n in names if misfit(n, slot) is None)
    assert make("firered_aed", attention=name).position == "sine"


def test_slots_follow_the_decoder():
    assert set(get_model("aed").slots()) == {"encoder", "decoder", "cross"}
    assert set(get_model("ctc").slots()) == {"encoder"}
    assert set(get_model("aed").slots(decoder_layers=0)) == {"encoder"}


def test_depth_moves_at_equal_size():
    """aed_shallow has the weights of aed, in other places."""
    sizes = []
    for name in ("aed", "aed_shallow"):
        model = build_model(name, resolve_slots(get_model(name).slots(), {"name": "softmax"}))
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert abs(sizes[0] - sizes[1]) / sizes[0] < 0.05


def test_short_and_empty_audio():
    """One sample, less than a frame, nothing: no crash and no NaN."""
    model = make()
    for samples in (0, 1, 80):
        audio = torch.zeros(2, max(samples, 1))
        memory, count = model.encode(audio, torch.tensor([samples, 1]))
        assert bool(memory.isfinite().all())
        assert len(greedy(model, memory, count).tokens) == 2


def test_options_include_inherited_ones():
    assert model_options("aed_shallow")["encoder_layers"] == 4
    assert model_options("aed_shallow")["stem"] == "conv1d"


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"encoder": "rnn"}, "transformer or conformer"),
        ({"wait": -1}, "wait=-1 must be at least 0"),
        ({"ctc_per_place": 0}, "at least 1"),
        ({"position": "rel", "encoder": "transformer"}, "encoder=conformer"),
        ({"subsampling": 3}, "2, 4 or 8"),
        ({"stem": "fft"}, "conv1d"),
        ({"num_heads": 5}, "must divide"),
        ({"normalise": "batch"}, "utterance, global or none"),
        ({"conv_kernel": 4}, "odd"),
        ({"time_ratio": 1.5}, "outside"),
    ],
)
def test_bad_options_name_the_way_out(options, hint):
    with pytest.raises(ConfigError, match=hint):
        make(**options)


def test_spec_augment_stays_inside_the_utterance():
    """Masks hide at most what they may, and only in training."""
    from zoo.layers.audio import SpecAugment

    layer = SpecAugment(freq_masks=1, freq_width=5, time_masks=2, time_ratio=0.1)
    x, lengths = torch.ones(4, 100, 20), torch.tensor([100, 50, 20, 1])
    torch.manual_seed(0)
    hidden_rows = 0
    for _ in range(50):
        y = layer(x, lengths)
        rows = (y == 0).all(-1)
        hidden_rows += int(rows.sum())
        for row, n in zip(rows, lengths.tolist(), strict=True):
            assert not bool(row[n:].any())
            assert int(row.sum()) <= 2 * (0.1 * n + 1)
        assert int((y == 0).all(1).sum(-1).max()) <= 5
    assert hidden_rows > 0
    assert layer.eval()(x, lengths) is x


def test_band_warping_moves_peaks():
    """A peak moves by one factor an utterance, within the bound, in training alone; what is constant over bands stays."""
    from zoo.layers.audio import SpecAugment

    augment = SpecAugment(0, 0, 0, 0.0, freq_warp=0.2).train()
    x = torch.zeros(40, 3, 64)
    x[..., 29:32] = torch.tensor([0.5, 1.0, 0.5])
    lengths = torch.full((40,), 3)
    peaks = augment(x, lengths).argmax(-1)
    assert (peaks == peaks[:, :1]).all() and peaks.unique().numel() > 5
    assert 24 <= int(peaks.min()) and int(peaks.max()) <= 38  # 30 / 1.2 .. 30 / 0.8
    torch.testing.assert_close(augment(torch.ones(4, 3, 64), lengths[:4]), torch.ones(4, 3, 64))
    assert torch.equal(augment.eval()(x, lengths), x)


def test_no_mask_where_nothing_is_padded():
    from zoo.layers.audio import padding_mask

    assert padding_mask(torch.tensor([4, 4]), 4) is None
    assert padding_mask(torch.tensor([4, 3]), 4).tolist() == [[True] * 4, [True] * 3 + [False]]


def test_cross_attention_maps():
    """One map a block, rows of one sentence summing to 1 over its valid places and blind to the padding."""
    from zoo.decoding.align import align_attention, cross_attention_maps

    model = make()
    memory, count = model.encode(*sound(2400, 1300))
    maps = cross_attention_maps(model, torch.randint(3, 15, (2, 5)), memory, count)
    assert maps.shape == (2, 2, 2, 5, memory.shape[1])
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 2, 5))
    assert float(maps[:, 1, :, :, int(count[1]) :].abs().max()) == 0
    spans = align_attention(model, memory[:1], [4, 5, 6])
    assert len(spans) == 3 and [a for a, _ in spans] == sorted(a for a, _ in spans)
    assert all(0 <= a <= b < memory.shape[1] for a, b in spans)


def test_occlusion_of_nothing_is_nothing():
    """Hiding a stretch that is zero already changes no prediction; hiding another does."""
    from zoo.decoding.align import occlusion_saliency

    model = make()
    features, _ = model.front(*sound(2400))
    features[:, 8:16] = 0
    saliency = occlusion_saliency(model, [4, 5, 6], features=features, width=2)
    assert saliency.shape == (3, model.stem.lengths(torch.tensor(features.shape[1])))
    assert float(saliency[:, 2:4].abs().max()) < 1e-6 < float(saliency[:, :2].abs().max())
    memory, _ = model.encode_features(features, torch.tensor([features.shape[1]]))
    memory[:, 4:6] = 0
    saliency = occlusion_saliency(model, [4, 5], memory=memory, width=2)
    assert float(saliency[:, 4:6].abs().max()) < 1e-6 < float(saliency[:, :4].abs().max())
    with pytest.raises(ConfigError, match="one of the two"):
        occlusion_saliency(model, [4])


def test_labels_heard_counts_collapsed_labels():
    """With a head that is sure of itself the count is that of the best path with repeats and blanks removed."""
    model = make(label_positions=True, ctc_per_place=1)
    path = [0, 5, 5, 0, 0, 5, 7, 0, 9, 9]
    with torch.no_grad():
        model.ctc_head.bias.zero_()
        model.ctc_head.weight.zero_()
        model.ctc_head.weight[:, : model.vocab_size] = 50 * torch.eye(model.vocab_size)
    memory = torch.nn.functional.one_hot(torch.tensor([path]), model.dim).float()
    expected = torch.tensor([[0, 1, 1, 1, 1, 2, 3, 3, 4, 4]], dtype=torch.float)
    torch.testing.assert_close(model.labels_heard(memory), expected, atol=1e-5, rtol=0)


def test_shifted_positions_agree():
    """The shift moves decoder and label positions alike: a decoder that compares them alone notices nothing."""
    model = make(position_shift=50)
    memory, heard = torch.zeros(2, 9, model.dim), torch.arange(1.0, 10).repeat(2, 1)
    tokens, shift = torch.full((2, 9), 5), torch.tensor([[7], [50]])
    content = model.embedding(tokens) * model.dim**0.5
    plain, moved = (
        (model._embed(tokens, shift=by) - content) @ model._located(memory, heard, by).mT
        for by in (None, shift)
    )
    assert torch.equal(plain.argmax(-1), torch.arange(9).repeat(2, 1))
    torch.testing.assert_close(moved, plain, atol=1e-4, rtol=1e-4)
    prefix = torch.randint(3, 15, (2, 6))
    same = [model.eval().decode(prefix, memory, torch.tensor([9, 9])) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(model.train().decode(prefix, memory, torch.tensor([9, 9])), same[0])


def test_untrained_decoder_looks_at_its_place():
    """Cross-attention starts with its weight near the label whose turn it is, wherever that is in the sentence."""
    torch.manual_seed(0)
    options = {**TINY, "dim": 128, "num_heads": 4}
    model = build_model(
        "aed", resolve_slots(get_model("aed").slots(**options), {"name": "softmax"}), **options
    )
    heard, tokens = torch.arange(1.0, 61)[None], torch.randint(3, 15, (1, 60))
    block = model.eval().decoder[0]
    memory = model._located(torch.randn(1, 60, 128), heard)
    weights = block.cross.attention_map(block.norm_cross(model._embed(tokens)), memory).mean(1)[0]
    distance = (torch.arange(60)[:, None] - torch.arange(60)).abs()
    near = (weights * (distance <= 3)).sum(1) / (distance <= 3).sum(1)
    far = (weights * (distance > 10)).sum(1) / (distance > 10).sum(1)
    assert (near > 1.5 * far).float().mean() > 0.9, (near / far).tolist()


def test_ctc_frames_between_places():
    """Two frames a place: logits keep their order, and alignment answers in fractions of places."""
    from zoo.decoding.align import align_ctc

    model = make("ctc", ctc_per_place=2)
    path = [5, 0, 0, 7, 7, 0, 9, 5]
    with torch.no_grad():
        model.ctc_head.bias.zero_()
        model.ctc_head.weight.zero_()
        for frame, token in enumerate(path):  # place frame // 2 shows one-hot content
            model.ctc_head.weight[frame % 2 * model.vocab_size + token, frame // 2] = 50.0
    memory = torch.eye(4, model.dim)[None]
    logits = model.ctc_logits(memory)
    assert logits.argmax(-1).tolist() == [path]
    assert model.labels_heard(memory).tolist()[0] == pytest.approx([1.0, 1.5, 2.0, 3.5])
    assert align_ctc(model, memory, [5, 7, 9, 5]) == [(0.0, -0.5), (1.5, 1.5), (3.0, 2.5), (3.5, 3.0)]


def test_label_positions_tell_equal_sounds_apart():
    """Two places with the same content differ for the decoder once another label lies between them, and only then."""
    for label_positions in (False, True):
        model = make(label_positions=label_positions)
        memory = torch.randn(1, 6, model.dim).repeat(1, 2, 1)
        read = model._located(memory)
        assert torch.equal(read[:, :6], read[:, 6:]) != label_positions


def test_features_do_not_depend_on_autocast():
    model = make()
    audio, lengths = sound(4000, 1200)
    plain, _ = model.front(audio, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = model.front(audio, lengths)
    assert torch.equal(plain, mixed)


@pytest.mark.parametrize("attention", ["softmax", "mala"])
def test_benchmark_contestants_write_the_same_tokens(attention):
    """What is timed with states and with recomputation is the same work."""
    from zoo.bench.peers_asr import DIM, build
    from zoo.bench.peers_asr_decode import recomputed, stepwise

    model, memory = build(attention).eval(), torch.randn(2, 20, DIM)
    assert torch.equal(stepwise(model, memory, 12)(), recomputed(model, memory, 12)())
