"""The model against a second implementation in numpy float64; the effect of each knob and parameter."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt as t
from tests.helpers import gaussian, noisy_model, random_tokens, tiny


def test_parameter_counts_of_presets():
    def shapes_of(h):
        return {name: shape for name, (shape, _) in t.parameter_table(h).items()}

    def count(preset):
        return sum(map(math.prod, shapes_of(t.load_config([f"preset={preset}"], {})).values()))

    assert count("record_sp1024") == 26_928_176
    assert count("h100x1") == 35_941_932
    assert count("record") == count("sp8192") == 35_943_980  # the loop has more skips
    sp8192 = shapes_of(t.load_config(["preset=sp8192"], {}))
    assert not {"bigram_emb", "ve_emb"} & sp8192.keys()
    h = tiny()
    model = t.GPT(h)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes_of(h)
    assert all(p.dtype == torch.float32 for p in model.parameters())


# ---------------------------------------------------------------- a second implementation


def norm(x):
    """Return the RMS norm over the last dimension."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def rotated(x, position, dims, base):
    """Rotate one head's vector at one position: pair (j, j + dims / 2) by position / base^(2j / dims)."""
    out = x.copy()
    for j in range(dims // 2):
        angle = position * base ** (-2 * j / dims)
        a = x[j]
        b = x[j + dims // 2]
        out[j] = a * math.cos(angle) + b * math.sin(angle)
        out[j + dims // 2] = b * math.cos(angle) - a * math.sin(angle)
    return out


def normed_and_rotated(x, h):
    """Norm one head's vectors (T, Dh) and rotate each by its position."""
    return np.stack([rotated(vector, i, h.rope_dims, h.rope_base) for i, vector in enumerate(norm(x))])


def reference_embed(p, h, tokens):
    """Embed one sequence, position by position. Returns (T, D)."""
    starts = [i == 0 or token == h.bos_id for i, token in enumerate(tokens)]
    buckets = h.bigram_vocab_size - 1
    x = []
    for i, token in enumerate(tokens):
        embedded = p["tok_emb"][token]
        if buckets > 0:
            bucket = buckets if starts[i] else ((36313 * token) ^ (27191 * tokens[i - 1])) % buckets
            embedded = embedded + p["bigram_scale"][0] * (p["bigram_proj"] @ p["bigram_emb"][bucket])
        x.append(norm(embedded))
    gate = 1 / (1 + np.exp(-p["smear_gate"]))
    return np.stack([x[i] if starts[i] else x[i] + gate * (x[i - 1] - x[i]) for i in range(len(tokens))])


def reference_attention(p, h, layer, inputs, values):
    """Attend within one sequence, head by head and query by query.

    inputs (T, D), normalized; values (T, Hkv * Dh) or None.
    """
    L = h.num_layers
    z = inputs * (p["attn_gain"][layer] if h.norm_gains else 1) / math.sqrt(layer + 1)
    Dh = h.model_dim // h.num_heads
    T = len(z)
    q = z @ p["qo_bank"][layer].T
    k = z @ p["kv_bank"][layer].T
    v = z @ p["kv_bank"][L + layer].T + (0 if values is None else values)
    out = np.zeros((T, h.model_dim))
    for head in range(h.num_heads):
        group = head // (h.num_heads // h.num_kv_heads)
        own = slice(head * Dh, head * Dh + Dh)
        shared = slice(group * Dh, group * Dh + Dh)
        qs = normed_and_rotated(q[:, own], h) * p["q_gain"][layer][head]
        ks = normed_and_rotated(k[:, shared], h)
        vs = v[:, shared]
        for i in range(T):
            score = ks[: i + 1] @ qs[i] / math.sqrt(Dh)
            weight = np.exp(score - score.max())
            y = weight / weight.sum() @ vs[: i + 1]
            if layer >= L - h.xsa_last_n:
                y = y - (y @ vs[i]) / (vs[i] @ vs[i]) * vs[i]
            if h.attn_gate_dims:
                y = y / (1 + np.exp(-0.5 * p["attn_gate"][layer][head] @ inputs[i][: h.attn_gate_dims]))
            out[i, own] = y
    return out @ p["qo_bank"][L + layer].T


def reference_mlp(p, h, layer, x):
    """Apply a layer's norm, MLP and output scale. x (T, D)."""
    z = norm(x) * (p["mlp_gain"][layer] if h.norm_gains else 1)
    u = z / math.sqrt(layer + 1) @ p["mlp_up_bank"][layer].T
    hidden = np.where(u > 0, u, 0.5 * u) ** 2
    return p["mlp_scale"][layer] * (hidden @ p["mlp_down_bank"][layer].T)


def reference_visits(h):
    """Return the layers in the order of their visits, counting the visits that are left to each."""
    loop = h.loop_layers.split()
    visits = []
    layer = 0
    rounds = h.loop_times
    while layer < h.num_layers:
        visits.append(layer)
        if loop and layer == int(loop[-1]) and rounds > 0:
            rounds -= 1
            layer = int(loop[0])
        else:
            layer += 1
    return visits


def reference_logits(p, h, sequence):
    """Return the softcapped logits of one sequence, (T, V)."""
    L = h.num_layers
    visits = reference_visits(h)
    half = len(visits) // 2
    tokens = [int(token) for token in sequence]
    x = x0 = reference_embed(p, h, tokens)
    if h.ve_last_n:
        ve = p["ve_scale"][0] * (p["ve_emb"][tokens] @ p["ve_proj"].T)
    outputs = []
    other = None  # the second stream, while there are two
    for visit, i in enumerate(visits):
        if half <= visit < 2 * half:
            mirror = 2 * half - 1 - visit  # the last of the first half goes first
            skipped = p["skip_weights"][visit - half] * outputs[mirror]
            if h.skip_gates:
                gate = 1 / (1 + np.exp(-p["skip_gate"][visit - half]))
                x = gate * x + (1 - gate) * skipped
            else:
                x = x + skipped
        values = ve * p["ve_layer_scale"][i - (L - h.ve_last_n)] if i >= L - h.ve_last_n else None
        if h.parallel_form == "two_streams" and i >= L - h.parallel_last_n:
            other = x if other is None else other
            mixed = p["resid_mix"][i][0] * x + p["resid_mix"][i][1] * x0
            attended = p["attn_scale"][i] * reference_attention(p, h, i, norm(mixed), values)
            fed = reference_mlp(p, h, i, other)
            number = i - (L - h.parallel_last_n)
            keep = p["stream_keep"][number]
            add = p["stream_add"][number]
            x = keep[0] * x + add[0][0] * attended + add[0][1] * fed
            other = keep[1] * other + add[1][0] * attended + add[1][1] * fed
            outputs.append((x + other) / 2)
            continue
        if other is not None:
            x = (x + other) / 2
            other = None
        x = p["resid_mix"][i][0] * x + p["resid_mix"][i][1] * x0
        attended = p["attn_scale"][i] * reference_attention(p, h, i, norm(x), values)
        fed = reference_mlp(p, h, i, x if i >= L - h.parallel_last_n else x + attended)
        x = x + attended + fed
        outputs.append(x)
    logits = norm(outputs[-1]) @ p["tok_emb"].T
    return h.logit_softcap * np.tanh(logits / h.logit_softcap)


def arrays(model):
    """Return the parameters as float64 arrays by name."""
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


VARIANTS = [
    {},
    {"num_layers": 1, "xsa_last_n": 1, "ve_last_n": 1},
    {"num_layers": 3, "xsa_last_n": 0, "ve_last_n": 3},
    {"num_layers": 5, "xsa_last_n": 5},
    {"num_kv_heads": 4},
    {"num_kv_heads": 1, "rope_dims": 8},
    {"rope_dims": 0},
    {"rope_base": 50.0},
    {"logit_softcap": 2.0},
    {"bos_id": 3},
    {"mlp_mult": 1.5},
    {"bigram_vocab_size": 0},
    {"ve_last_n": 0},
    {"loop_layers": "1 2", "loop_times": 2},
    {"loop_layers": "3", "loop_times": 1, "xsa_last_n": 4},
    {"loop_layers": "0 1 2 3", "loop_times": 1, "num_layers": 5, "bigram_vocab_size": 0, "ve_last_n": 0},
    {"loop_layers": "1 2", "loop_times": 0},
    {"skip_gates": 1},
    {"norm_gains": 1},
    {"norm_gains": 1, "attn_gate_dims": 5, "parallel_last_n": 2, "loop_layers": "1 2", "loop_times": 1},
    {"attn_gate_dims": 5, "xsa_last_n": 1},
    {"skip_gates": 1, "attn_gate_dims": 32, "loop_layers": "1 2", "loop_times": 2},
    {"parallel_last_n": 2},
    {"parallel_last_n": 4, "loop_layers": "2", "loop_times": 1},
    {"parallel_last_n": 1, "parallel_form": "two_streams"},
    {"parallel_last_n": 4, "parallel_form": "two_streams", "skip_gates": 1},
    # From two streams back to one and again to two; attn_gate_dims: both kinds of optional weights.
    {
        "parallel_last_n": 2,
        "parallel_form": "two_streams",
        "loop_layers": "1 2",
        "loop_times": 1,
        "attn_gate_dims": 2,
    },
]


@pytest.mark.parametrize(
    "knobs", VARIANTS, ids=lambda k: ",".join(f"{a}={b}" for a, b in k.items()) or "tiny"
)
def test_logits_match_the_second_implementation(knobs):
    h = tiny(**knobs)
    model = noisy_model(h, seed=1, scale=0.3, dtype=torch.float64)
    tokens = random_tokens(h, (2, 13), seed=2, bos_share=0.2)
    got = model.logits(tokens).detach().numpy()
    expected = np.stack([reference_logits(arrays(model), h, sequence) for sequence in tokens])
    assert expected.std() > 0.1  # something to compare
    # The output layer and the rope tables are float32; measured: 8.6e-7.
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)
    single = noisy_model(h, seed=1, scale=0.3).logits(tokens).detach().numpy()
    np.testing.assert_allclose(single, expected, atol=5e-4, rtol=0)  # measured: 5.8e-6


def test_loss_logits_and_nats_agree():
    h = tiny()
    model = noisy_model(h)
    tokens = random_tokens(h, (3, 16), 1)
    targets = random_tokens(h, (3, 16), 2)
    logits = model.logits(tokens).detach().double().numpy()
    assert logits.shape == (3, 16, h.vocab_size)
    peak = logits.max(-1, keepdims=True)
    log_sum = (peak + np.log(np.exp(logits - peak).sum(-1, keepdims=True)))[..., 0]
    nats = log_sum - np.take_along_axis(logits, targets.numpy()[..., None], -1)[..., 0]
    assert model.loss(tokens, targets).item() == pytest.approx(nats.mean(), abs=1e-6)  # measured: 2.9e-7
    for last in (1, 5, 16):
        got = model.nats(tokens, targets, last)
        assert got.shape == (3, last) and got.dtype == torch.float32
        np.testing.assert_allclose(got.detach().numpy(), nats[:, -last:], atol=1e-5)  # measured: 5e-7


CAUSAL = [
    {},
    dict(loop_layers="0 1", loop_times=2, bigram_vocab_size=0, ve_last_n=0),
    dict(attn_gate_dims=3, skip_gates=1, parallel_last_n=2, parallel_form="two_streams"),
    dict(attn_windows="4 0", doc_mask=1),
]


@pytest.mark.parametrize("knobs", CAUSAL, ids=str)
@pytest.mark.parametrize("bos_at", [(), (5,), (5, 6), (0, 1, 15), (8,)])
def test_no_logit_depends_on_a_later_token(bos_at, knobs):
    """Compare bits, on a CPU, for every cut, also for one right after a document start."""
    h = tiny(num_layers=3, **knobs)
    model = noisy_model(h, scale=0.3)
    tokens = random_tokens(h, (1, 16), 3, bos_share=0.0)
    tokens[0, list(bos_at)] = h.bos_id
    with torch.no_grad():
        before = model.logits(tokens)
        for cut in range(16):
            changed = tokens.clone()
            changed[0, cut + 1 :] = random_tokens(h, (1, 16), 100 + cut, bos_share=0.3)[0, cut + 1 :]
            after = model.logits(changed)
            assert torch.equal(after[:, : cut + 1], before[:, : cut + 1]), cut
            if not torch.equal(changed, tokens):
                assert not torch.equal(after, before)


def test_sequences_of_a_batch_do_not_see_each_other():
    h = tiny()
    model = noisy_model(h)
    tokens = random_tokens(h, (3, 16), 4)
    with torch.no_grad():
        batch = model.logits(tokens)
        for i in range(3):
            # Measured: 0.
            torch.testing.assert_close(model.logits(tokens[i : i + 1])[0], batch[i], atol=1e-6, rtol=0)


def test_the_embedding_does_not_look_across_a_document_start():
    h = tiny()
    model = noisy_model(h, scale=0.5)
    tokens = random_tokens(h, (1, 16), 5, bos_share=0.0)
    tokens[0, 7] = h.bos_id
    with torch.no_grad():
        base = model.embed(tokens)
        changed = tokens.clone()
        changed[0, :7] = random_tokens(h, (1, 7), 6, bos_share=0.0)
        assert torch.equal(model.embed(changed)[0, 7:], base[0, 7:])
        assert not torch.equal(model.embed(changed)[0, :7], base[0, :7])
        inside = tokens.clone()  # where no document starts, a position does see the one before it
        inside[0, 9] = (tokens[0, 9] - h.bos_id) % (h.vocab_size - h.bos_id - 1) + h.bos_id + 1
        moved = (model.embed(inside) != base).any(-1)[0]
        assert moved.nonzero().flatten().tolist() in ([9, 10], [9, 10, 11])  # 11: smear of 10's bigram


@pytest.mark.parametrize("part", ["smear", "bigram"])
def test_smear_and_bigram_each_look_back_on_their_own(part):
    h = tiny()
    model = noisy_model(h, scale=0.5)
    with torch.no_grad():
        if part == "smear":
            model.bigram_scale.zero_()
        else:
            model.smear_gate.fill_(-1e4)
    tokens = random_tokens(h, (1, 8), 7, bos_share=0.0)
    changed = tokens.clone()
    changed[0, 3] = h.bos_id + 1 if tokens[0, 3] != h.bos_id + 1 else h.bos_id + 2
    moved = (model.embed(changed) != model.embed(tokens)).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [3, 4]


# ---------------------------------------------------------------- each knob and parameter


@pytest.mark.parametrize(
    "knob",
    [
        {"xsa_last_n": 0},
        {"xsa_last_n": 4},
        {"rope_dims": 0},
        {"rope_dims": 8},
        {"rope_base": 3.0},
        {"logit_softcap": 1.0},
        {"bos_id": 9},
        {"num_heads": 2, "num_kv_heads": 1},
        {"bigram_vocab_size": 0},
        {"ve_last_n": 0},
        {"loop_layers": "1 2", "loop_times": 1},
        {"loop_layers": "1", "loop_times": 2},
        {"skip_gates": 1},
        {"attn_gate_dims": 4},
        {"parallel_last_n": 2},
        {"parallel_last_n": 2, "parallel_form": "two_streams"},
    ],
    ids=str,
)
def test_a_knob_changes_the_output(knob):
    """Give the same tensors to another knob's model, which then differs."""
    models = [t.GPT(tiny()), t.GPT(tiny(**knob))]
    source = dict(noisy_model(tiny(), scale=0.3).named_parameters())
    for model in models:
        for name, p in model.named_parameters():
            if name not in source:
                continue
            both = tuple(slice(min(sizes)) for sizes in zip(p.shape, source[name].shape))
            p.data[both] = source[name].data[both]
    tokens = random_tokens(tiny(), (1, 16), 8, bos_share=0.0)
    tokens[0, 4] = 9
    default, other = (model.logits(tokens).detach() for model in models)
    assert (default - other).abs().max() > 1e-3


# Parts that `record_sp1024` lacks.
OPTIONAL = dict(
    loop_layers="1 2",
    loop_times=1,
    skip_gates=1,
    norm_gains=1,
    attn_gate_dims=5,
    parallel_last_n=1,
    parallel_form="two_streams",
)


@pytest.mark.parametrize(
    "knobs,name", [(knobs, name) for knobs in ({}, OPTIONAL) for name in t.parameter_table(tiny(**knobs))]
)
def test_every_parameter_matters_and_learns(knobs, name):
    """Check that each slice of each tensor moves the loss and gets the gradient of a difference quotient."""
    h = tiny(**knobs)
    model = noisy_model(h, scale=0.3, dtype=torch.float64)

    def unembed_in_float64(x, change):
        return h.logit_softcap * torch.tanh(F.linear(x, model.tok_emb) / h.logit_softcap)

    model.unembed = unembed_in_float64
    tokens = random_tokens(h, (4, 16), 9)
    targets = random_tokens(h, (4, 16), 10)
    model.loss(tokens, targets).backward()
    p = dict(model.named_parameters())[name]
    by_row = p.dim() > 1 and name not in ("bigram_emb", "ve_emb")  # of those only some rows are looked up
    slices = p.grad.flatten(1) if by_row else p.grad[None].flatten(1)
    assert (slices.abs().amax(1) > 0).all(), "a slice without gradient"

    direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = (p.grad * direction).sum().item()
    step = 1e-5
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            p.add_(sign * step * direction)
            losses.append(model.loss(tokens, targets).item())
            p.sub_(sign * step * direction)
    # Measured: 1.7e-6.
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    "knobs", [{}, OPTIONAL, dict(out_scale_init=0.0, proj_init_std=0.1, norm_gains=1)], ids=str
)
def test_gradient_reaches_every_parameter_from_the_init(knobs):
    """Train a few steps: zero outputs block their inputs at first, and nothing is blocked any more."""
    h = tiny(**knobs)
    model = t.GPT(h)
    tokens = random_tokens(h, (8, 16), 11)
    targets = random_tokens(h, (8, 16), 12)
    for _ in range(4):
        model.zero_grad()
        model.loss(tokens, targets).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.05 * p.grad / (p.grad.norm() + 1e-12))
    dead = [name for name, p in model.named_parameters() if p.grad.abs().max() == 0]
    assert not dead, f"never receives a gradient: {dead}"


# ---------------------------------------------------------------- the parts


def test_exclusive_attention_is_orthogonal_to_the_own_value():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 7, 6, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 7, 2, 8, generator=generator, dtype=torch.float64)
    out = t.exclude_self(y, v)
    own = v.repeat_interleave(3, dim=2)
    assert (out * own).sum(-1).abs().max() < 1e-13  # measured: 2.1e-15
    removed = y - out  # parallel to v and nothing else
    along = (removed * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own
    torch.testing.assert_close(removed, along, atol=1e-14, rtol=0)  # measured: 2.2e-16
    assert (y * own).sum(-1).abs().min() > 1e-6
    assert torch.isfinite(t.exclude_self(y, torch.zeros_like(v))).all()


def test_rope_keeps_norms_and_depends_on_distance_only():
    x = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = t.rms_norm(x).expand(1, 40, 2, 16)
    rope = [r.double() for r in t.rope_tables(40, 8, 100.0, torch.device("cpu"))]
    out = t.qk_norm_rope(x.expand(1, 40, 2, 16), torch.ones(2), *rope)
    torch.testing.assert_close(out.norm(dim=-1), same.norm(dim=-1), rtol=2e-7, atol=0)  # measured: 1.1e-8
    assert torch.equal(out[..., 8:], same[..., 8:]) and torch.equal(out[:, 0], same[:, 0])
    q, k = out[0].unbind(1)
    products = q @ k.T  # (40, 40): constant along diagonals, and not constant across them
    for distance in range(-20, 21):
        diagonal = products.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5  # measured: 4.4e-7
    assert products[0].std() > 0.1


def test_softcap_bounds_the_logits():
    h = tiny(logit_softcap=3.0)
    model = noisy_model(h)
    with torch.no_grad():
        model.tok_emb.mul_(100)
    logits = model.logits(random_tokens(h, (1, 16), 1))
    assert 2.9 < logits.abs().max() <= 3.0


def test_qk_norm_makes_scores_independent_of_scale():
    x = gaussian(1, 5, 2, 8)
    rope = t.rope_tables(5, 4, 1e4, torch.device("cpu"))
    gain = torch.tensor([1.5, 0.25])
    out = t.qk_norm_rope(x, torch.ones(2), *rope)
    # Measured: 4.6e-6.
    torch.testing.assert_close(t.qk_norm_rope(100 * x, torch.ones(2), *rope), out, atol=1e-4, rtol=0)
    torch.testing.assert_close(t.qk_norm_rope(x, gain, *rope), out * gain[:, None])


def test_grouped_attention_equals_repeated_heads():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 4, 8, generator=generator)
    k, v = (torch.randn(2, 9, 2, 8, generator=generator) for _ in range(2))
    repeated = t.attend_sdpa(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))
    torch.testing.assert_close(t.attend_sdpa(q, k, v), repeated)


@pytest.mark.parametrize(
    "layers,loop", [(1, {}), (2, {}), (5, {}), (11, {}), (11, dict(loop_layers="4 5", loop_times=2))], ids=str
)
def test_the_skips_are_a_u(layers, loop):
    table = t.layer_table(tiny(num_layers=layers, xsa_last_n=1, ve_last_n=1, **loop))
    half = len(table) // 2
    kept = []
    skips = []  # from, to, row of skip_weights
    for i, spec in enumerate(table):
        if spec.skip >= 0:
            skips.append((kept.pop(), i, spec.skip))
        if spec.push:
            kept.append(i)
    assert kept == []
    assert skips == [(2 * half - 1 - i, i, i - half) for i in range(half, 2 * half)]


def test_a_loop_repeats_rows_of_the_table():
    """Compare with parameter-golf #1394: 11 layers, 4 5 twice more, 7 visits before the middle, 8 after."""
    knobs = dict(num_layers=11, xsa_last_n=4, attn_windows="7 0")
    h = tiny(loop_layers="4 5", loop_times=2, **knobs)
    table = t.layer_table(h)
    once = t.layer_table(tiny(**knobs))
    assert [spec.layer for spec in table] == [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 6, 7, 8, 9, 10]
    assert len(table) == h.num_visits and sum(spec.push for spec in table) == 7
    assert [spec.skip for spec in table[7:]] == [0, 1, 2, 3, 4, 5, 6, -1]
    for spec in table:  # a visit is like the layer's only one, apart from its skips
        same = once[spec.layer]
        assert dataclasses.replace(spec, push=same.push, skip=same.skip) == same
    assert t.parameter_table(h)["skip_weights"][0] == (7, h.model_dim)

    model = t.GPT(h)
    plain = model.without_loop()
    assert plain.layers == once and model.layers == table
    assert all(p is q for p, q in zip(model.parameters(), plain.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["one_stream", pytest.param("two_streams", marks=pytest.mark.long)])
def test_both_tables_compile_into_one_graph_each(form):
    """Compile with fullgraph and static shapes, and call both in turn, as around the loop's begin."""
    torch._dynamo.reset()
    h = tiny(**OPTIONAL | dict(num_layers=3, loop_layers="1", parallel_last_n=2, parallel_form=form))
    model = noisy_model(h, scale=0.3)
    tokens, targets = random_tokens(h, (2, 2, 16), 1)
    counter = CompileCounterWithBackend("aot_eager")
    losses = []
    for each in (model, model.without_loop()):
        compiled = torch.compile(each.loss, backend=counter, fullgraph=True, dynamic=False)
        losses.append((each.loss, compiled))
    for _ in range(2):
        for eager, compiled in losses:
            torch.testing.assert_close(compiled(tokens, targets), eager(tokens, targets))
            compiled(tokens, targets).backward()
    assert counter.frame_count == 2
    assert losses[0][0](tokens, targets) != losses[1][0](tokens, targets)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_diagonal_factors_lie_in_the_matrices(dtype):
    """Multiply 1/sqrt(depth) and gains into columns, output scales into rows, in float32, and round once."""
    h = tiny(norm_gains=1)
    L = h.num_layers
    model = noisy_model(h)
    model.dtype = dtype
    p = {name: x.detach() for name, x in model.named_parameters()}
    for i, w in enumerate(model.layer_weights()):
        depth = torch.tensor(float(i + 1)) ** -0.5
        qkv = torch.cat([p["qo_bank"][i], p["kv_bank"][i], p["kv_bank"][L + i]])
        assert torch.equal(w.qkv, (qkv * (depth * p["attn_gain"][i])).to(dtype))
        assert torch.equal(w.o, (p["attn_scale"][i][:, None] * p["qo_bank"][L + i]).to(dtype))
        assert torch.equal(w.up, (p["mlp_up_bank"][i] * (depth * p["mlp_gain"][i])).to(dtype))
        assert torch.equal(w.down, (p["mlp_scale"][i][:, None] * p["mlp_down_bank"][i]).to(dtype))
        assert torch.equal(w.q_gain, p["q_gain"][i])
        assert torch.equal(w.resid_mix, p["resid_mix"][i])


# ---------------------------------------------------------------- initialisation


def test_at_the_start_only_the_embedding_counts():
    """Start from zero outputs: attention and MLP add nothing.

    Skips add multiples of the embedding, which the norm undoes.
    """
    h = tiny()
    model = t.GPT(h)
    tokens = random_tokens(h, (2, 16), 13)
    x = t.rms_norm(model.embed(tokens))
    torch.testing.assert_close(model.trunk(tokens), x, atol=1e-5, rtol=0)  # measured: 3.6e-6
    positions = t.Positions(*t.rope_tables(16, h.rope_dims, h.rope_base, torch.device("cpu")), None)
    for w, spec in zip(model.layer_weights(), model.layers):
        assert t.attention_block(x, w, spec, None, positions, t.Ops()).abs().max() == 0
        assert t.mlp(x, w.up, w.down).abs().max() == 0

    h = t.load_config(["preset=cpu"], {})
    loss = t.GPT(h).loss(random_tokens(h, (2, 64), 1), random_tokens(h, (2, 64), 2)).item()
    assert loss == pytest.approx(math.log(h.vocab_size), abs=0.05)  # measured: 0.019


def test_orthogonal_inits_are_orthogonal():
    h = tiny()
    model = t.GPT(h)
    L = h.num_layers
    for bank in (model.mlp_up_bank, model.kv_bank, model.qo_bank[:L]):
        for matrix in bank.detach().double():
            wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
            eye = torch.eye(len(wide), dtype=torch.float64)
            torch.testing.assert_close(wide @ wide.T, eye, atol=1e-5, rtol=0)  # measured: 4.8e-7
    assert model.qo_bank[L:].abs().max() == 0 and model.mlp_down_bank.abs().max() == 0
    assert not torch.equal(model.kv_bank[0], model.kv_bank[1])
    assert model.tok_emb.std().item() == pytest.approx(h.tied_embed_init_std, rel=0.1)  # measured: 0.0079


@pytest.mark.parametrize("start", [1.0, 0.25])
def test_output_scales_start_at_their_knob_and_gains_at_one(start):
    model = t.GPT(tiny(norm_gains=1, out_scale_init=start))
    assert all(bool((p == start).all()) for p in (model.attn_scale, model.mlp_scale))
    assert all(bool((p == 1).all()) for p in (model.attn_gain, model.mlp_gain))
    assert not hasattr(t.GPT(tiny()), "attn_gain")


def test_the_seed_decides_the_init():
    model = t.GPT(tiny(seed=5))
    torch_state = torch.get_rng_state()
    torch.manual_seed(99)
    again = t.GPT(tiny(seed=5))
    other = t.GPT(tiny(seed=6))
    torch.set_rng_state(torch_state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.qo_bank, other.qo_bank)
    assert not torch.equal(model.tok_emb, other.tok_emb)


def test_an_unknown_init_is_an_error():
    with pytest.raises(ValueError, match="uniform"):
        t.init_tensor((2, 2), t.Init("uniform", 1.0), torch.Generator())
