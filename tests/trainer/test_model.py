"""The model against a second implementation in numpy float64, and what each knob and parameter does."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from helpers import noisy_model, random_tokens, tiny


def test_parameter_count_of_the_default_model():
    with torch.device("meta"):
        shapes = {k: shape for k, (shape, _) in t.parameter_table(t.load_config([], {})).items()}
    assert sum(map(math.prod, shapes.values())) == 26_928_176
    h = tiny()
    model = t.GPT(h)
    assert {k: tuple(p.shape) for k, p in model.named_parameters()} == {
        k: shape for k, (shape, _) in t.parameter_table(h).items()
    }
    assert all(p.dtype == torch.float32 for p in model.parameters())


# ---------------------------------------------------------------- a second implementation


def norm(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def rotated(x, position, dims, base):
    """One head's vector at one position, pair (j, j + dims / 2) by angle position / base^(2j / dims)."""
    out = x.copy()
    for j in range(dims // 2):
        angle = position * base ** (-2 * j / dims)
        a, b = x[j], x[j + dims // 2]
        out[j] = a * math.cos(angle) + b * math.sin(angle)
        out[j + dims // 2] = b * math.cos(angle) - a * math.sin(angle)
    return out


def reference_embed(p, h, row):
    """Embedding of one sequence, (T, D), position by position."""
    x = []
    for i, token in enumerate(row):
        start = i == 0 or token == h.bos_id
        buckets = h.bigram_vocab_size - 1
        bucket = buckets if start else ((36313 * token) ^ (27191 * row[i - 1])) % buckets
        x.append(
            norm(p["tok_emb"][token] + p["bigram_scale"][0] * (p["bigram_proj"] @ p["bigram_emb"][bucket]))
        )
    gate = 1 / (1 + np.exp(-p["smear_gate"]))
    keep = lambda i: i == 0 or row[i] == h.bos_id
    return np.stack([x[i] if keep(i) else x[i] + gate * (x[i - 1] - x[i]) for i in range(len(row))])


def reference_attention(p, h, layer, z, values):
    """Attention of one sequence, head by head and query by query. z (T, D); values (T, Hkv * Dh) or None."""
    L, Dh, T = h.num_layers, h.model_dim // h.num_heads, len(z)
    q, k = z @ p["qo_bank"][layer].T, z @ p["kv_bank"][layer].T
    v = z @ p["kv_bank"][L + layer].T + (0 if values is None else values)
    out = np.zeros((T, h.model_dim))
    for head in range(h.num_heads):
        group = head // (h.num_heads // h.num_kv_heads)
        mine, theirs = slice(head * Dh, head * Dh + Dh), slice(group * Dh, group * Dh + Dh)
        spin = lambda x: np.stack([rotated(r, i, h.rope_dims, h.rope_base) for i, r in enumerate(norm(x))])
        qs, ks, vs = spin(q[:, mine]) * p["q_gain"][layer][head], spin(k[:, theirs]), v[:, theirs]
        for i in range(T):
            score = ks[: i + 1] @ qs[i] / math.sqrt(Dh)
            weight = np.exp(score - score.max())
            y = weight / weight.sum() @ vs[: i + 1]
            if layer >= L - h.xsa_last_n:
                y = y - (y @ vs[i]) / (vs[i] @ vs[i]) * vs[i]
            out[i, mine] = y
    return out @ p["qo_bank"][L + layer].T


def reference_logits(p, h, row):
    """Softcapped logits of one sequence, (T, V)."""
    L, row = h.num_layers, [int(x) for x in row]
    x = x0 = reference_embed(p, h, row)
    ve = p["ve_scale"][0] * (p["ve_emb"][row] @ p["ve_proj"].T)
    outputs = []
    for i in range(L):
        if L // 2 <= i < 2 * (L // 2):
            mirror = 2 * (L // 2) - 1 - i  # the last of the first half goes first
            x = x + p["skip_weights"][i - L // 2] * outputs[mirror]
        x = p["resid_mix"][i][0] * x + p["resid_mix"][i][1] * x0
        values = ve * p["ve_layer_scale"][i - (L - h.ve_last_n)] if i >= L - h.ve_last_n else None
        z = norm(x) / math.sqrt(i + 1)
        x = x + p["attn_scale"][i] * reference_attention(p, h, i, z, values)
        z = norm(x) / math.sqrt(i + 1)
        u = z @ p["mlp_up_bank"][i].T
        u = np.where(u > 0, u, 0.5 * u) ** 2
        x = x + p["mlp_scale"][i] * (u @ p["mlp_down_bank"][i].T)
        outputs.append(x)
    logits = norm(x) @ p["tok_emb"].T
    return h.logit_softcap * np.tanh(logits / h.logit_softcap)


def arrays(model):
    return {k: v.detach().double().numpy() for k, v in model.named_parameters()}


VARIANTS = [
    {}, {"num_layers": 1, "xsa_last_n": 1, "ve_last_n": 1}, {"num_layers": 3, "xsa_last_n": 0, "ve_last_n": 3},
    {"num_layers": 5, "xsa_last_n": 5}, {"num_kv_heads": 4}, {"num_kv_heads": 1, "rope_dims": 8},
    {"rope_dims": 0}, {"rope_base": 50.0}, {"logit_softcap": 2.0}, {"bos_id": 3}, {"mlp_mult": 1.5},
]  # fmt: skip


@pytest.mark.parametrize(
    "knobs", VARIANTS, ids=lambda k: ",".join(f"{a}={b}" for a, b in k.items()) or "tiny"
)
def test_logits_match_the_second_implementation(knobs):
    h = tiny(**knobs)
    model = noisy_model(h, seed=1, scale=0.3, dtype=torch.float64)
    tokens = random_tokens(h, (2, 13), seed=2, bos_share=0.2)
    got = model.logits(tokens).detach().numpy()
    expected = np.stack([reference_logits(arrays(model), h, row) for row in tokens])
    assert expected.std() > 0.1  # something to compare
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)  # head() and the rope tables are float32
    single = noisy_model(h, seed=1, scale=0.3).logits(tokens).detach().numpy()
    np.testing.assert_allclose(single, expected, atol=5e-4, rtol=0)


def test_loss_logits_and_nats_agree():
    h = tiny()
    model = noisy_model(h)
    tokens, targets = random_tokens(h, (3, 16), 1), random_tokens(h, (3, 16), 2)
    logits = model.logits(tokens).detach().double().numpy()
    assert logits.shape == (3, 16, h.vocab_size)
    peak = logits.max(-1, keepdims=True)
    log_sum = (peak + np.log(np.exp(logits - peak).sum(-1, keepdims=True)))[..., 0]
    nats = log_sum - np.take_along_axis(logits, targets.numpy()[..., None], -1)[..., 0]
    assert model.loss(tokens, targets).item() == pytest.approx(nats.mean(), abs=1e-6)
    for last in (1, 5, 16):
        got = model.nats(tokens, targets, last)
        assert got.shape == (3, last) and got.dtype == torch.float32
        np.testing.assert_allclose(got.detach().numpy(), nats[:, -last:], atol=1e-5)


@pytest.mark.parametrize("bos_at", [(), (5,), (5, 6), (0, 1, 15), (8,)])
def test_no_logit_depends_on_a_later_token(bos_at):
    """Bit-equal on the CPU, for every cut, just behind a document start included."""
    h = tiny(num_layers=3)
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


def test_rows_of_a_batch_do_not_see_each_other():
    h = tiny()
    model = noisy_model(h)
    tokens = random_tokens(h, (3, 16), 4)
    with torch.no_grad():
        batch = model.logits(tokens)
        for i in range(3):
            torch.testing.assert_close(model.logits(tokens[i : i + 1])[0], batch[i], atol=2e-5, rtol=0)


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
        inside = tokens.clone()  # without a start between them the next position does see it
        inside[0, 9] = (tokens[0, 9] - h.bos_id) % (h.vocab_size - h.bos_id - 1) + h.bos_id + 1
        moved = (model.embed(inside) != base).any(-1)[0]
        assert moved.nonzero().flatten().tolist() in ([9, 10], [9, 10, 11])  # 11: smear of 10's bigram


@pytest.mark.parametrize("share", ["smear", "bigram"])
def test_smear_and_bigram_each_look_back_on_their_own(share):
    h = tiny()
    model = noisy_model(h, scale=0.5)
    with torch.no_grad():
        if share == "smear":
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
    "knob", [{"xsa_last_n": 0}, {"xsa_last_n": 4}, {"rope_dims": 0}, {"rope_dims": 8}, {"rope_base": 3.0},
             {"logit_softcap": 1.0}, {"bos_id": 9}, {"num_heads": 2, "num_kv_heads": 1}],
    ids=str,
)  # fmt: skip
def test_a_knob_changes_the_output(knob):
    """The same tensors under another knob give another model."""
    models = [t.GPT(tiny()), t.GPT(tiny(**knob))]
    source = dict(noisy_model(tiny(), scale=0.3).named_parameters())
    for model in models:
        for name, p in model.named_parameters():
            p.data.copy_(source[name].data[tuple(slice(n) for n in p.shape)])
    tokens = random_tokens(tiny(), (1, 16), 8, bos_share=0.0)
    tokens[0, 4] = 9
    a, b = (m.logits(tokens).detach() for m in models)
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("name", t.parameter_table(tiny()))
def test_every_parameter_matters_and_learns(name):
    """Each slice of each tensor moves the loss and receives a gradient that matches a difference quotient."""
    h = tiny()
    model = noisy_model(h, scale=0.3, dtype=torch.float64)
    model.unembed = lambda x: (
        h.logit_softcap * torch.tanh(F.linear(x, model.tok_emb) / h.logit_softcap)
    )  # float64
    tokens, targets = random_tokens(h, (4, 16), 9), random_tokens(h, (4, 16), 10)
    model.loss(tokens, targets).backward()
    p = dict(model.named_parameters())[name]
    by_row = p.dim() > 1 and name not in ("bigram_emb", "ve_emb")  # of those only some rows are looked up
    slices = p.grad.flatten(1) if by_row else p.grad[None].flatten(1)
    assert (slices.abs().amax(1) > 0).all(), "a slice without gradient"
    direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope, step = (p.grad * direction).sum().item(), 1e-5
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            p.add_(sign * step * direction)
            values.append(model.loss(tokens, targets).item())
            p.sub_(sign * step * direction)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_gradient_reaches_every_parameter_from_the_init():
    """Zero outputs block their inputs at first; after a few steps nothing is blocked any more."""
    h = tiny()
    model = t.GPT(h)
    tokens, targets = random_tokens(h, (8, 16), 11), random_tokens(h, (8, 16), 12)
    for _ in range(4):
        model.zero_grad()
        model.loss(tokens, targets).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.05 * p.grad / (p.grad.norm() + 1e-12))
    dead = [k for k, p in model.named_parameters() if p.grad.abs().max() == 0]
    assert not dead, f"never receives a gradient: {dead}"


# ---------------------------------------------------------------- the parts


def test_exclusive_attention_is_orthogonal_to_the_own_value():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 7, 6, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 7, 2, 8, generator=generator, dtype=torch.float64)
    out = t.exclude_self(y, v)
    own = v.repeat_interleave(3, dim=2)
    assert (out * own).sum(-1).abs().max() < 1e-12
    removed = y - out  # parallel to v and nothing else
    along = (removed * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own
    torch.testing.assert_close(removed, along, atol=1e-12, rtol=0)
    assert (y * own).sum(-1).abs().min() > 1e-6
    assert torch.isfinite(t.exclude_self(y, torch.zeros_like(v))).all()


def test_rope_keeps_norms_and_depends_on_distance_only():
    x = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = t.rms_norm(x).expand(1, 40, 2, 16)
    rope = [r.double() for r in t.rope_tables(40, 8, 100.0, torch.device("cpu"))]
    out = t.qk_norm_rope(x.expand(1, 40, 2, 16), torch.ones(2), *rope)
    torch.testing.assert_close(out.norm(dim=-1), same.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(out[..., 8:], same[..., 8:]) and torch.equal(out[:, 0], same[:, 0])
    q, k = out[0, :, 0], out[0, :, 1]
    products = q @ k.T  # (40, 40): constant along diagonals, and not constant across them
    for distance in range(-20, 21):
        diagonal = products.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5
    assert products[0].std() > 0.1


def test_softcap_bounds_the_logits():
    h = tiny(logit_softcap=3.0)
    model = noisy_model(h)
    with torch.no_grad():
        model.tok_emb.mul_(100)
    logits = model.logits(random_tokens(h, (1, 16), 1))
    assert 2.9 < logits.abs().max() <= 3.0


def test_qk_norm_makes_scores_independent_of_scale():
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = t.rope_tables(5, 4, 1e4, torch.device("cpu"))
    one, gain = torch.ones(2), torch.tensor([1.5, 0.25])
    torch.testing.assert_close(
        t.qk_norm_rope(100 * x, one, cos, sin), t.qk_norm_rope(x, one, cos, sin), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        t.qk_norm_rope(x, gain, cos, sin), t.qk_norm_rope(x, one, cos, sin) * gain[:, None]
    )


def test_grouped_attention_equals_repeated_heads():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 4, 8, generator=generator)
    k, v = (torch.randn(2, 9, 2, 8, generator=generator) for _ in range(2))
    torch.testing.assert_close(
        t.attend_sdpa(q, k, v), t.attend_sdpa(q, *(x.repeat_interleave(2, 2) for x in (k, v)))
    )


@pytest.mark.parametrize("layers", [1, 2, 5, 11])
def test_the_skips_are_a_u(layers):
    table = t.layer_table(tiny(num_layers=layers, xsa_last_n=1, ve_last_n=1))
    half = layers // 2
    kept, pairs = [], []
    for i, spec in enumerate(table):
        if spec.skip >= 0:
            pairs.append((kept.pop(), i, spec.skip))
        if spec.push:
            kept.append(i)
    assert kept == [] and pairs == [(2 * half - 1 - i, i, i - half) for i in range(half, 2 * half)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_diagonal_factors_lie_in_the_matrices(dtype):
    """1/sqrt(depth) in columns, output scales in rows, multiplied in float32 and rounded once."""
    h = tiny()
    model = noisy_model(h)
    model.dtype = dtype
    p, L = {k: v.detach() for k, v in model.named_parameters()}, h.num_layers
    for i, w in enumerate(model.layer_weights()):
        depth = torch.tensor(float(i + 1)) ** -0.5
        qkv = torch.cat([p["qo_bank"][i], p["kv_bank"][i], p["kv_bank"][L + i]])
        assert torch.equal(w.qkv, (qkv * depth).to(dtype))
        assert torch.equal(w.o, (p["attn_scale"][i][:, None] * p["qo_bank"][L + i]).to(dtype))
        assert torch.equal(w.up, (p["mlp_up_bank"][i] * depth).to(dtype))
        assert torch.equal(w.down, (p["mlp_scale"][i][:, None] * p["mlp_down_bank"][i]).to(dtype))
        assert torch.equal(w.q_gain, p["q_gain"][i]) and torch.equal(w.resid_mix, p["resid_mix"][i])


# ---------------------------------------------------------------- initialisation


def test_at_the_start_only_the_embedding_speaks():
    """Zero outputs: attention and MLP add nothing, skips add multiples of the embedding, which the norm undoes."""
    h = tiny()
    model = t.GPT(h)
    tokens = random_tokens(h, (2, 16), 13)
    x0 = model.embed(tokens)
    torch.testing.assert_close(model.trunk(tokens), t.rms_norm(x0), atol=1e-5, rtol=0)
    x = t.rms_norm(x0)
    for w, spec in zip(model.layer_weights(), model.layers):
        rope = t.rope_tables(16, h.rope_dims, h.rope_base, torch.device("cpu"))
        assert t.attention_block(x, w, spec, None, t.Positions(*rope, None), t.Ops()).abs().max() == 0
        assert t.mlp(x, w.up, w.down).abs().max() == 0
    h = t.load_config(["preset=cpu"], {})
    loss = t.GPT(h).loss(*(random_tokens(h, (2, 64), s) for s in (1, 2))).item()
    assert loss == pytest.approx(math.log(h.vocab_size), abs=0.05)


def test_orthogonal_inits_are_orthogonal():
    h = tiny()
    model = t.GPT(h)
    L = h.num_layers
    for bank in (model.mlp_up_bank, model.kv_bank, model.qo_bank[:L]):
        for matrix in bank.detach().double():
            short = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
            torch.testing.assert_close(
                short @ short.T, torch.eye(len(short), dtype=torch.float64), atol=1e-5, rtol=0
            )
    assert model.qo_bank[L:].abs().max() == 0 and model.mlp_down_bank.abs().max() == 0
    assert not torch.equal(model.kv_bank[0], model.kv_bank[1])
    assert model.tok_emb.std().item() == pytest.approx(h.tied_embed_init_std, rel=0.1)


def test_output_scales_start_at_one():
    model = t.GPT(tiny())
    assert all(bool((p == 1).all()) for p in (model.attn_scale, model.mlp_scale))


def test_the_seed_decides_the_init():
    a, torch_state = t.GPT(tiny(seed=5)), torch.get_rng_state()
    torch.manual_seed(99)
    b, c = t.GPT(tiny(seed=5)), t.GPT(tiny(seed=6))
    torch.set_rng_state(torch_state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.qo_bank, c.qo_bank) and not torch.equal(a.tok_emb, c.tok_emb)


def test_an_unknown_init_is_an_error():
    with pytest.raises(ValueError, match="uniform"):
        t.init_tensor((2, 2), "uniform 1", torch.Generator())
