"""Attention windows and document masks: who sees whom, the flash operator's arguments, what is bound."""

import dataclasses
import math

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

import train_gpt as t
from helpers import noisy_model, random_tokens, tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = [(3, False), (7, False), (0, True), (3, True), (16, False), (40, True)]  # of rows of 16 tokens


def sees(i, j, window, docs):
    """Whether token i sees token j; docs: numbers of one row, or None."""
    return j <= i and (not window or i - j < window) and (docs is None or docs[i] == docs[j])


def written_out(q, k, v, window=0, docs=None):
    """Attention one query and one head at a time."""
    out = torch.zeros_like(q)
    for b, i, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        group, row = h // (q.size(2) // k.size(2)), None if docs is None else docs[b]
        keys = [j for j in range(q.size(1)) if sees(i, j, window, row)]
        scores = k[b, keys, group] @ q[b, i, h] / math.sqrt(q.size(3))
        out[b, i, h] = scores.softmax(0) @ v[b, keys, group]
    return out


def heads(B, T, H, kv, Dh, dtype=torch.float32, device=DEVICE, seed=0):
    """q, k and v with gradients; v a slice of a wider product, as in the model."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(B, T, n, Dh, generator=generator).to(device, dtype)
    return [draw(H).requires_grad_(), draw(kv).requires_grad_(), draw(2 * kv)[:, :, kv:].requires_grad_()]


def with_gradients(fn, qkv, **how):
    leaves = [x.detach().requires_grad_() for x in qkv]
    y = fn(*leaves, **how)
    y.backward(torch.arange(y.numel(), device=y.device).sin().view_as(y).to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves)]


# ---------------------------------------------------------------- the flash operator, on a CPU


class Flash:
    """A CPU's _flash_attention_forward and _backward: plain lines, sequence by sequence. calls: the arguments."""

    def __init__(self):
        self.calls, self.wrong = [], 0.0
        self.library = torch.library.Library("aten", "IMPL", "CPU")
        self.library.impl("_flash_attention_forward", self.forward)
        self.library.impl("_flash_attention_backward", self.backward)

    def each(self, tensors, bounds):
        """The sequences of a dense or a ragged batch, without the empty ones."""
        q, k = tensors[:2]
        assert (q.dim(), q.size(-2) % k.size(-2)) == (4 if bounds is None else 3, 0)
        if bounds is None:
            return list(zip(*tensors))
        cuts = bounds.tolist()
        assert cuts == sorted(cuts) and cuts[0] == 0 and cuts[-1] == len(q) and bounds.dtype == torch.int32
        return [[x[a:b] for x in tensors] for a, b in zip(cuts, cuts[1:]) if a < b]

    def weights(self, q, k, causal, left, right):
        """(H, T, T) of one sequence; k has H heads."""
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (back < 0) & (causal or right == 0) | (back > (1 << 30 if left is None else left))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.size(-1) ** -0.5
        return scores.masked_fill(hidden, -math.inf).softmax(-1)

    def one(self, q, k, v, *mask):
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1).float() for x in (k, v))
        return torch.einsum("hqk,khd->qhd", self.weights(q.float(), k, *mask), v).to(q.dtype)

    def one_back(self, q, k, v, dout, *mask):
        """By hand: a kernel is below autograd."""
        groups, dtype, scale = k.size(1), q.dtype, q.size(-1) ** -0.5
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1).float() for x in (k, v))
        q, dout = q.float(), dout.float()
        w, dw = self.weights(q, k, *mask), torch.einsum("qhd,khd->hqk", dout, v)
        ds = w * (dw - (w * dw).sum(-1, keepdim=True)) * scale
        dq = torch.einsum("hqk,khd->qhd", ds, k)
        dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", w, dout)
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
        return [x.to(dtype) for x in (dq, dk, dv)]

    def forward(self, q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale=None,
                window_size_left=None, window_size_right=None, **rest):  # fmt: skip
        assert (cum_q is None) == (cum_k is None) and dropout == 0 and not debug and scale is None
        left, right = window_size_left, window_size_right
        self.calls.append(dict(q=q, v=v, bounds=cum_q, longest=(max_q, max_k), causal=causal, window=(left, right)))
        out = [self.one(*x, causal, left, right) for x in self.each((q, k, v), cum_q)]
        out = (torch.stack if cum_q is None else torch.cat)(out) * (1 + self.wrong)
        empty = torch.empty(0)
        return out, empty, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), empty.to(q.dtype)

    def backward(self, dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, state, unused, *,
                 scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
        mask = causal, window_size_left, window_size_right
        rows = [self.one_back(*x, *mask) for x in self.each((q, k, v, dout), cum_q)]
        return tuple((torch.stack if cum_q is None else torch.cat)(x) for x in zip(*rows))


@pytest.fixture
def flash():
    if DEVICE.type == "cuda":
        pytest.skip("the operator's stand-in on a CPU")
    stand_in = Flash()
    yield stand_in
    stand_in.library._destroy()


@pytest.mark.parametrize("window,own", KINDS)
def test_the_torch_line_shows_what_it_should(window, own):
    qkv = heads(2, 16, 4, 2, 8, torch.float64, torch.device("cpu"))
    docs = t.documents(random_tokens(tiny(), (2, 16), 1, bos_share=0.2), 1) if own else None
    torch.testing.assert_close(t.attend_sdpa(*qkv, window, docs), written_out(*qkv, window, docs), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window,own", KINDS)
def test_flash_is_the_torch_line(window, own, flash):
    """Output and gradients; more than DOCUMENTS documents in a row, one, and starts at its ends."""
    tokens = random_tokens(tiny(), (4, 16), 1, bos_share=0.3)
    tokens[1], tokens[2], tokens[3, [0, 15]] = 1, 5, 1
    how = dict(window=window, docs=t.documents(tokens, 1) if own else None)
    qkv = heads(4, 16, 4, 2, 8)
    for got, want in zip(with_gradients(t.attend_flash, qkv, **how), with_gradients(t.attend_sdpa, qkv, **how)):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    assert bool(flash.calls) == (own or window < 16)


def test_the_operators_arguments(flash):
    """Documents: as many sequences whatever the tokens are, none of them copied; a window: no causal flag."""
    B, T, row = 3, 40, list(range(7, 47))
    tokens = torch.tensor([row, row, row])
    tokens[0, [3, 4, 30]] = 1
    tokens[1, 2::2] = 1  # 19 starts and the row's own
    q, k, v = heads(B, T, 4, 2, 8)
    docs = t.documents(tokens, 1)
    for window in (0, 6):
        t.attend_flash(q, k, v, window, docs)
        call = flash.calls.pop()
        bounds = call["bounds"].tolist()
        assert len(bounds) == B * t.DOCUMENTS + 1
        expected = [0, 3, 4, 30, *range(40, 40 + 2 * t.DOCUMENTS, 2), 80, 120]
        assert sorted(set(bounds)) == expected and bounds == sorted(bounds)
        assert call["longest"] == (T, T) and call["q"].shape == (B * T, 4, 8)
        assert call["v"].data_ptr() == v.data_ptr() and call["v"].stride() == v.stride()[1:]
        assert (call["causal"], call["window"]) == ((False, (5, 0)) if window else (True, (None, None)))
    t.attend_flash(q, k, v, 6)
    assert flash.calls[0]["bounds"] is None and flash.calls[0]["q"].shape == (B, T, 4, 8)
    assert (flash.calls[0]["causal"], flash.calls[0]["window"]) == (False, (5, 0))
    for window in (0, T, T + 1):
        torch.testing.assert_close(t.attend_flash(q, k, v, window), t.attend_sdpa(q, k, v))
    assert len(flash.calls) == 1


def test_one_graph_trains_like_the_torch_line(flash):
    """The operator inside a compiled model: no graph break, the same loss and gradients, bounds made once."""
    h = tiny(attn_windows="4 0", doc_mask=True)
    models = [noisy_model(h, scale=0.3), noisy_model(h, scale=0.3)]
    models[0].ops = t.Ops(attend=t.attend_flash)
    x, y = random_tokens(h, (2, 2, 16), 3, bos_share=0.2)
    graphs = []

    def backend(graph, inputs):
        return aot_autograd(fw_compiler=lambda g, i: graphs.append(g) or make_boxed_func(g.forward),
                            partition_fn=min_cut_rematerialization_partition)(graph, inputs)

    loss = torch.compile(models[0].loss, dynamic=False, fullgraph=True, backend=backend)
    losses = [loss(x, y), models[1].loss(x, y)]
    for one in losses:
        one.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    for p, q in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    names = [str(n.target) for n in graphs[0].graph.nodes]
    assert sum("_flash_attention_forward" in n for n in names) == h.num_layers
    assert sum("aten.lt." in n for n in names) == 1, "the bounds are made in every layer"


# ---------------------------------------------------------------- documents, the layer table, the model


def test_documents_are_counted_within_a_row():
    tokens = torch.tensor([[5, 5, 1, 5, 1, 1], [1, 5, 5, 5, 5, 1], [5, 5, 5, 5, 5, 5]])
    assert t.document_starts(tokens, 1).int().tolist() == [[1, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0]]
    assert t.documents(tokens, 1).tolist() == [[0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 0, 1], [0] * 6]
    many = t.documents(torch.ones(1, 40, dtype=torch.long), 1)[0].tolist()
    assert many == [*range(t.DOCUMENTS), *[t.DOCUMENTS - 1] * (40 - t.DOCUMENTS)]


@pytest.mark.parametrize(
    "pattern,windows",
    [("", [0] * 5), ("7", [7] * 5), ("3 0", [3, 0, 3, 0, 3]), (" 5  6 7 8 9 10 ", [5, 6, 7, 8, 9])],
)
def test_a_pattern_is_repeated_over_the_layers(pattern, windows):
    for own in (False, True):
        table = t.layer_table(tiny(num_layers=5, attn_windows=pattern, doc_mask=own))
        assert [(s.window, s.docs) for s in table] == [(w, own) for w in windows]


def moved_by(h, at, tokens, local=True):
    """Positions whose logits move when the token at `at` changes. local: no token speaks for its neighbour."""
    model = noisy_model(h, scale=0.3)
    with torch.no_grad():
        if local:
            model.bigram_scale.zero_()
            model.smear_gate.fill_(-1e4)
        other = tokens.clone()
        other[0, at] = 3 if tokens[0, at] != 3 else 4
        return (model.logits(other) != model.logits(tokens)).any(-1)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "layers,pattern,reach",
    [(1, "1", 0), (1, "4", 3), (2, "3 5", 6), (2, "5 3", 6), (3, "2 4", 5), (2, "4 0", 12), (1, "", 12), (1, "13", 12)],
)
def test_a_token_reaches_as_far_as_the_windows(layers, pattern, reach):
    """`reach` tokens further, of 16; the layers' windows less one add up."""
    h = tiny(num_layers=layers, attn_windows=pattern, xsa_last_n=0, ve_last_n=1)
    tokens = random_tokens(h, (1, 16), 4, bos_share=0.0)
    assert moved_by(h, 3, tokens) == list(range(3, min(16, 3 + reach + 1)))


def test_a_token_moves_no_logit_of_another_document():
    h = tiny(doc_mask=True)
    tokens = random_tokens(h, (1, 16), 4, bos_share=0.0)
    tokens[0, [5, 11]] = h.bos_id
    for at, end in ((2, 5), (7, 11), (13, 16)):
        assert moved_by(h, at, tokens, local=False) == list(range(at, end))
        assert moved_by(tiny(), at, tokens, local=False) == list(range(at, 16))
    assert moved_by(tiny(doc_mask=True, attn_windows="2", num_layers=1, xsa_last_n=0, ve_last_n=1), 6, tokens) == [6, 7]


@pytest.mark.parametrize("knobs", [dict(attn_windows="3"), dict(doc_mask=True), dict(attn_windows="3 0", doc_mask=True)],
                         ids=str)  # fmt: skip
def test_a_mask_changes_the_loss_and_not_causality(knobs):
    h = tiny(**knobs)
    model, plain = noisy_model(h, scale=0.3), noisy_model(tiny(), scale=0.3)
    x, y = random_tokens(h, (2, 1, 16), 5, bos_share=0.0)
    x[0, [6, 9]] = h.bos_id
    assert (model.loss(x, y) - plain.loss(x, y)).abs() > 1e-4
    with torch.no_grad():
        before = model.logits(x)
        for cut in range(15):
            changed = x.clone()
            changed[0, cut + 1:] = random_tokens(h, (15 - cut,), 50 + cut, bos_share=0.4)
            assert torch.equal(model.logits(changed)[:, : cut + 1], before[:, : cut + 1]), cut


def test_masks_that_hide_nothing_change_nothing():
    x, y = random_tokens(tiny(), (2, 2, 16), 6, bos_share=0.0)
    want = noisy_model(tiny(), scale=0.3).loss(x, y)
    for knobs in (dict(attn_windows="16"), dict(attn_windows="17 999999999 0")):
        assert torch.equal(noisy_model(tiny(**knobs), scale=0.3).loss(x, y), want)
    for knobs in (dict(doc_mask=True), dict(doc_mask=True, attn_windows="16 0")):
        torch.testing.assert_close(noisy_model(tiny(**knobs), scale=0.3).loss(x, y), want)


def test_an_artifact_carries_both_knobs():
    h = tiny(attn_windows="4 0", doc_mask=True, num_layers=2)
    tensors = dict(noisy_model(h).named_parameters())
    header = t.open_artifact(t.pack_artifact(tensors, h))[0]
    again = t.load_config([], {}, header["config"])
    assert (again.attn_windows, again.doc_mask) == ("4 0", True)
    assert t.layer_table(again) == t.layer_table(h)
    wrong = t.pack_artifact(tensors, dataclasses.replace(h, attn_windows="4 -1"))
    with pytest.raises(t.InputError, match="attn_windows='4 -1'"):
        t.load_config([], {}, t.open_artifact(wrong)[0]["config"])


# ---------------------------------------------------------------- what is bound


def planted(monkeypatch, works, package=True):
    """bind_attention where only `works` run: (name, what became of FlashAttention-4, the switches)."""
    switches, fa4 = {}, []
    for name in ("cudnn", "flash", "mem_efficient", "math"):
        monkeypatch.setattr(torch.backends.cuda, f"enable_{name}_sdp",
                            lambda on, name=name: switches.update({name.removeprefix("mem_"): on}))  # fmt: skip

    def activate(name):
        assert name == "FA4"
        if not package:
            raise ModuleNotFoundError("No module named 'flash_attn'")
        fa4.append(True)

    def attend(q, k, v):
        on = [name for name, value in switches.items() if value]
        on = ["flash4"] if on == ["flash"] and fa4 else on
        if not set(on) & set(works):
            raise (AttributeError if on == ["flash4"] else RuntimeError)(f"{on}")
        return q * k * v

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda warn: fa4.clear())
    monkeypatch.setattr(t, "attend_sdpa", attend)
    return t.bind_attention(torch.device("cpu"), 8), fa4, [name for name, on in switches.items() if on]


@pytest.mark.parametrize(
    "works,name",
    [("flash4 cudnn flash efficient math", "flash4"), ("cudnn flash efficient math", "cudnn"),
     ("flash efficient math", "flash"), ("efficient math", "efficient"), ("math", "math")],
)  # fmt: skip
@pytest.mark.parametrize("package", [True, False])
def test_the_first_attention_that_runs_is_bound(works, name, package, monkeypatch):
    """One switch is on; FlashAttention-4 stays in the place of flash only when it is what was chosen."""
    if not package and name == "flash4":
        name = "cudnn"
    got, fa4, on = planted(monkeypatch, works.split(), package)
    assert (got, bool(fa4), on) == (name, name == "flash4", ["flash" if name == "flash4" else name])


def test_no_attention_is_one_line(monkeypatch):
    with pytest.raises(t.InputError, match="no attention kernel"):
        planted(monkeypatch, [])


def test_without_the_package_nothing_is_said(caplog, capfd):
    """The real calls: this machine has no flash-attn-4."""
    pytest.importorskip("torch.nn.attention")
    flags = "cudnn", "flash", "mem_efficient", "math"
    before = {f: getattr(torch.backends.cuda, f"{f}_sdp_enabled")() for f in flags}
    try:
        assert t.bind_attention(DEVICE, 64) != "flash4"
    finally:
        for f in flags:
            getattr(torch.backends.cuda, f"enable_{f}_sdp")(before[f])
    assert not caplog.records and capfd.readouterr() == ("", "")


def bound(attention, **knobs):
    h = t.load_config(["model_dim=64", "num_heads=2", "num_kv_heads=1", *(f"{k}={v}" for k, v in knobs.items())], {})
    before = torch.backends.cuda.mem_efficient_sdp_enabled()
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    try:
        ops, names = t.bind_ops(h, DEVICE, attention)
        return ops.attend, names["attention"], torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(before)


MASKS = [dict(attn_windows="512 0"), dict(doc_mask=1), dict(attn_windows="512 0", doc_mask=1)]


@pytest.mark.parametrize("knobs", MASKS, ids=str)
def test_masks_bind_flash_where_it_is_right(knobs, flash):
    assert bound("cudnn", **knobs) == (t.attend_flash, "cudnn+flash", False)
    forms = {(c["bounds"] is not None, c["causal"]) for c in flash.calls}
    expected = {"attn_windows": {(False, False)}, "doc_mask": {(True, True)}}
    assert forms == (expected[next(iter(knobs))] if len(knobs) == 1 else {(True, False), (True, True)})
    for name in ("flash", "flash4"):
        assert bound(name, **knobs)[:2] == (t.attend_flash, name)
    flash.wrong = 0.3
    assert bound("cudnn", **knobs) == (t.attend_sdpa, "cudnn+torch(error0.300)", True)
    assert bound("flash4", **knobs) == (t.attend_sdpa, "flash4+torch(error0.300)", True)


def test_one_wrong_form_is_enough_for_the_torch_line(flash, monkeypatch):
    real = flash.weights
    monkeypatch.setattr(flash, "weights", lambda q, k, causal, left, right: real(q, k, causal, None, right))
    assert bound("cudnn", doc_mask=1) == (t.attend_flash, "cudnn+flash", False)
    for knobs in (MASKS[0], MASKS[2]):
        attend, name, efficient = bound("cudnn", **knobs)
        assert attend is t.attend_sdpa and name.startswith("cudnn+torch(error") and " " not in name and efficient
    twice = lambda q, k, causal, left, right: real(q, k, causal, left, right) * (2 if causal else 1)
    monkeypatch.setattr(flash, "weights", twice)  # right with a window only
    assert bound("cudnn", **MASKS[0])[0] is t.attend_flash
    assert bound("cudnn", **MASKS[2])[0] is t.attend_sdpa


def test_no_mask_binds_nothing_new():
    assert bound("cudnn") == (t.attend_sdpa, "cudnn", False)
    if DEVICE.type == "cpu":  # where the operator does not exist
        attend, name, efficient = bound("cudnn", doc_mask=1)
        assert attend is t.attend_sdpa and name.startswith("cudnn+torch(") and " " not in name and efficient


@pytest.mark.gpu
@pytest.mark.parametrize("heads_of", [(8, 4, 64), (4, 4, 128)], ids=str)
@pytest.mark.parametrize("window,own", [(100, False), (0, True), (100, True), (512, True), (1, False)])
def test_flash_on_the_device_is_the_torch_line_in_float32(window, own, heads_of):
    tokens = torch.randint(2, 500, (3, 512), generator=torch.Generator().manual_seed(2))
    tokens[torch.rand(3, 512, generator=torch.Generator().manual_seed(3)) < 0.03] = 1
    tokens[2] = 1
    how = dict(window=window, docs=t.documents(tokens.to(DEVICE), 1) if own else None)
    qkv = heads(3, 512, *heads_of, dtype=torch.bfloat16)
    got = with_gradients(t.attend_flash, qkv, **how)
    want = with_gradients(t.attend_sdpa, [x.detach().float() for x in qkv], **how)
    for a, b in zip(got, want):
        assert ((a.float() - b).norm() / b.norm()) < 0.01


@pytest.mark.gpu
def test_a_compiled_model_with_masks_trains_on_the_device():
    h = t.load_config(["num_layers=2", "attn_windows=100 0", "doc_mask=1", "train_seq_len=512", "xsa_last_n=1"], {})
    ops, names = t.bind_ops(h, DEVICE, "flash")
    assert ops.attend is t.attend_flash, names
    x, y = random_tokens(h, (2, 4, 512), 3, bos_share=0.02).to(DEVICE)
    losses = []
    for attend, dtype in ((t.attend_flash, torch.bfloat16), (t.attend_sdpa, torch.float32)):
        model = t.GPT(h, t.Ops(attend=attend), dtype).to(DEVICE)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(DEVICE))
        loss = torch.compile(model.loss, dynamic=False, fullgraph=True)(x, y)
        loss.backward()
        losses.append(loss.item())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
