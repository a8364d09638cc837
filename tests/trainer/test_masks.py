"""Attention windows and document masks: who sees whom, the flash operator's arguments, what is bound."""

import dataclasses
import math
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

import train_gpt as t
from helpers import noisy_model, random_tokens, tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = [
    (3, False),
    (7, False),
    (1, False),
    (2, False),
    (4, False),
    (8, False),
    (0, True),
    (3, True),
    (4, True),
    (16, False),
    (40, True),
]  # of rows of 16 tokens


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


class Flash4:
    """flash_attn.cute.interface as flash-attn-4 4.0.0b36 has it, by plain lines, sequence by sequence, on a CPU.
    calls: the arguments."""

    def __init__(self):
        self.calls, self.wrong = [], 0.0

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

    def forward(self, q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                causal=False, window_size_left=None, return_lse=False):  # fmt: skip
        assert causal and return_lse and cu_seqlens_q is cu_seqlens_k
        right = None if window_size_left is None else 0
        self.calls.append(dict(q=q, v=v, bounds=cu_seqlens_q, longest=(max_seqlen_q, max_seqlen_k),
                               causal=right is None, window=(window_size_left, right)))  # fmt: skip
        mask = causal, window_size_left, right
        out = [self.one(*x, *mask) for x in self.each((q, k, v), cu_seqlens_q)]
        out = (torch.stack if cu_seqlens_q is None else torch.cat)(out) * (1 + self.wrong)
        lse = q[..., 0].mT.contiguous().float()  # any numbers: backward must get them again
        return out, lse, None, None, None

    def backward(self, q, k, v, out, dout, lse, causal=False, window_size_left=None, cu_seqlens_q=None, cu_seqlens_k=None,
                 max_seqlen_q=None, max_seqlen_k=None, deterministic=False):  # fmt: skip
        assert causal and dout.is_contiguous() and out.shape == dout.shape == q.shape
        assert torch.equal(lse, q[..., 0].mT.float())  # what forward gave
        assert (max_seqlen_q, max_seqlen_k) == self.calls[-1]["longest"] and cu_seqlens_q is cu_seqlens_k
        self.calls[-1]["deterministic"] = deterministic
        mask = causal, window_size_left, None if window_size_left is None else 0
        rows = [self.one_back(*x, *mask) for x in self.each((q, k, v, dout), cu_seqlens_q)]
        return tuple((torch.stack if cu_seqlens_q is None else torch.cat)(x) for x in zip(*rows))


@pytest.fixture
def flash4(monkeypatch):
    """A stand-in for the package."""
    stand_in, module = Flash4(), ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd = lambda *args, **how: stand_in.forward(*args, **how)
    module._flash_attn_bwd = lambda *args, **how: stand_in.backward(*args, **how)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return stand_in


@pytest.mark.parametrize("window,own", KINDS)
def test_the_torch_line_shows_what_it_should(window, own):
    qkv = heads(2, 16, 4, 2, 8, torch.float64, torch.device("cpu"))
    docs = t.documents(random_tokens(tiny(), (2, 16), 1, bos_share=0.2), 1) if own else None
    torch.testing.assert_close(
        t.attend_sdpa(*qkv, window, docs), written_out(*qkv, window, docs), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("window,own", [*KINDS, (0, False), (16, True)])
def test_flash4_is_the_torch_line(window, own, flash4):
    tokens = random_tokens(tiny(), (4, 16), 1, bos_share=0.3)
    tokens[1], tokens[2], tokens[3, [0, 15]] = 1, 5, 1
    how = dict(window=window, docs=t.documents(tokens, 1) if own else None)
    qkv = [x.cpu() for x in heads(4, 16, 4, 2, 8)]
    for got, want in zip(
        with_gradients(t.attend_flash4, qkv, **how), with_gradients(t.attend_sdpa, qkv, **how)
    ):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    (call,) = flash4.calls
    assert (call["bounds"] is not None) == own and call["longest"] == ((16, 16) if own else (None, None))
    assert (
        call["window"] == ((window - 1, 0) if 0 < window < 16 else (None, None)) and not call["deterministic"]
    )


def test_the_fake_flash4_is_the_operator(flash4):
    """Dense, and one row of sequences; forward and backward."""
    for flat, bounds in ((False, None), (True, torch.tensor([0, 5, 5, 9, 18], dtype=torch.int32))):
        qkv = [
            x.detach().flatten(0, 1) if flat else x.detach()
            for x in heads(2, 9, 4, 2, 8, torch.bfloat16, "cpu")
        ]
        out, lse = t.flash4_op(qkv, bounds, 9, 3, [])
        for back in ([], [out, torch.randn_like(out), lse]):
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(t.flash4_op, (qkv, bounds, 9, 3, back), test_utils=checks)


def test_flash4_is_deterministic_on_request(flash4):
    torch.use_deterministic_algorithms(True)
    try:
        with_gradients(t.attend_flash4, [x.cpu() for x in heads(1, 16, 2, 1, 8)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash4.calls[0]["deterministic"]


def test_the_operators_arguments(flash4):
    """Documents: as many sequences whatever the tokens are, none of them copied; a window that hides nothing: none."""
    B, T, row = 3, 40, list(range(7, 47))
    tokens = torch.tensor([row, row, row])
    tokens[0, [3, 4, 30]] = 1
    tokens[1, 2::2] = 1  # 19 starts and the row's own
    q, k, v = (x.cpu() for x in heads(B, T, 4, 2, 8))
    docs = t.documents(tokens, 1)
    for window in (0, 6):
        t.attend_flash4(q, k, v, window, docs)
        call = flash4.calls.pop()
        bounds = call["bounds"].tolist()
        assert len(bounds) == B * t.DOCUMENTS + 1
        expected = [0, 3, 4, 30, *range(40, 40 + 2 * t.DOCUMENTS, 2), 80, 120]
        assert sorted(set(bounds)) == expected and bounds == sorted(bounds)
        assert call["longest"] == (T, T) and call["q"].shape == (B * T, 4, 8)
        assert call["v"].data_ptr() == v.data_ptr() and call["v"].stride() == v.stride()[1:]
        assert (call["causal"], call["window"]) == ((False, (5, 0)) if window else (True, (None, None)))
    for window in (6, 0, T, T + 1):
        torch.testing.assert_close(t.attend_flash4(q, k, v, window), t.attend_sdpa(q, k, v, window))
        call = flash4.calls.pop()
        assert call["bounds"] is None and call["q"].shape == (B, T, 4, 8)
        assert (call["causal"], call["window"]) == ((False, (5, 0)) if window == 6 else (True, (None, None)))


def test_one_graph_trains_like_the_torch_line(flash4):
    """The operator inside a compiled model: no graph break, the same loss and gradients, bounds made once."""
    h = tiny(attn_windows="4 0", doc_mask=True)
    models = [noisy_model(h, scale=0.3), noisy_model(h, scale=0.3)]
    models[0].ops = t.Ops(attend=t.attend_flash4)
    x, y = random_tokens(h, (2, 2, 16), 3, bos_share=0.2)
    graphs = []

    def backend(graph, inputs):
        keep = lambda g, i: graphs.append(g) or make_boxed_func(g.forward)
        return aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)(graph, inputs)

    loss = torch.compile(models[0].loss, dynamic=False, fullgraph=True, backend=backend)
    losses = [loss(x, y), models[1].loss(x, y)]
    for one in losses:
        one.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    for p, q in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    for names in ([str(n.target) for n in g.graph.nodes] for g in graphs):
        assert sum("flash4" in n for n in names) == h.num_layers
    assert sum("aten.lt." in str(n.target) for n in graphs[0].graph.nodes) == 1, (
        "the bounds are made in every layer"
    )
    assert len(graphs) == 2


# ---------------------------------------------------------------- documents, the layer table, the model


def test_documents_are_counted_within_a_row():
    tokens = torch.tensor([[5, 5, 1, 5, 1, 1], [1, 5, 5, 5, 5, 1], [5, 5, 5, 5, 5, 5]])
    assert t.document_starts(tokens, 1).int().tolist() == [
        [1, 0, 1, 0, 1, 1],
        [1, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0, 0],
    ]
    assert t.documents(tokens, 1).tolist() == [[0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 0, 1], [0] * 6]
    many = t.documents(torch.ones(1, 40, dtype=torch.long), 1)[0].tolist()
    assert many == [*range(t.DOCUMENTS), *[t.DOCUMENTS - 1] * (40 - t.DOCUMENTS)]


@pytest.mark.parametrize(
    "window,keys", [(4, [8, 8]), (2, [4, 4]), (8, [16]), (3, [16]), (16, [16]), (0, [16])]
)
def test_a_window_that_divides_the_row_sees_few_keys(window, keys, monkeypatch):
    """In blocks of its length: a product makes twice as many scores as are seen, and not as many as without windows."""
    made, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **how: (made.append(k.size(2)), real(q, k, v, **how))[1],
    )
    t.attend_sdpa(*heads(2, 16, 4, 2, 8), window)
    assert made == keys


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
    [
        (1, "1", 0),
        (1, "4", 3),
        (2, "3 5", 6),
        (2, "5 3", 6),
        (3, "2 4", 5),
        (2, "4 0", 12),
        (1, "", 12),
        (1, "13", 12),
    ],
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
    assert moved_by(
        tiny(doc_mask=True, attn_windows="2", num_layers=1, xsa_last_n=0, ve_last_n=1), 6, tokens
    ) == [6, 7]


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
            changed[0, cut + 1 :] = random_tokens(h, (15 - cut,), 50 + cut, bos_share=0.4)
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


KERNELS = "cudnn", "flash", "mem_efficient", "math"
MASKS = [dict(attn_windows="512 0"), dict(doc_mask=1), dict(attn_windows="512 0", doc_mask=1)]


def switches():
    return [name for name in KERNELS if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]


@pytest.fixture
def bound():
    """knobs -> what bind_attention makes of them here: function, name, switches."""

    def bind(**knobs):
        sizes = ["model_dim=64", "num_heads=2", "num_kv_heads=1", "rope_dims=16"]
        h = t.load_config([*sizes, "attn_windows=", *(f"{k}={v}" for k, v in knobs.items())], {})
        bound = t.bind_attention(h, DEVICE)
        attend, name = bound.function, bound.label
        assert " " not in name
        return attend, name, switches()

    return bind


@pytest.mark.parametrize("works", [KERNELS[i:] for i in range(4)], ids=lambda works: works[0])
@pytest.mark.parametrize("knobs", [{}, *MASKS], ids=str)
def test_the_first_kernel_that_runs_is_bound(works, knobs, bound, monkeypatch):
    """One switch is on, where there are masks the efficient kernel's too; no word of a package that is not there."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)

    def attend(q, k, v, window=0, docs=None):
        if not set(switches()) & set(works):
            raise RuntimeError(f"{switches()}")
        return q * k * v

    monkeypatch.setattr(t, "attend_sdpa", attend)
    names = list(dict.fromkeys([works[0], *["mem_efficient"] * bool(knobs)]))
    assert bound(**knobs) == (attend, "+".join(names), sorted(names, key=KERNELS.index))


def test_no_attention_is_one_line(bound, monkeypatch):
    monkeypatch.setattr(t, "attend_sdpa", lambda *qkv, **how: 1 / 0)
    with pytest.raises(t.InputError, match="no attention kernel"):
        bound()


def test_what_this_machine_binds_runs_each_mask(bound, caplog, capfd):
    """The real calls, one after the other in a process: an earlier choice switches nothing off for a later."""
    for knobs in (*MASKS, {}, MASKS[1]):
        attend, name, on = bound(**knobs)
        assert name.split("+")[0] in (*KERNELS, "flash4") and (
            name == "flash4" or bool(knobs) == ("mem_efficient" in on)
        )
        qkv = heads(2, 64, 2, 1, 32, torch.bfloat16)
        docs = torch.arange(64, device=DEVICE).expand(2, 64) // 20
        how = dict(window=9 * ("attn_windows" in knobs), docs=docs if "doc_mask" in knobs else None)
        got = with_gradients(attend, qkv, **how)
        for a, b in zip(got, with_gradients(t.attend_sdpa, [x.detach().float().cpu() for x in qkv], **{
                k: v.cpu() if k == "docs" and v is not None else v for k, v in how.items()})):  # fmt: skip
            assert (a.float().cpu() - b).norm() / b.norm() < 0.02
    assert not caplog.records and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("knobs", [{}, *MASKS], ids=str)
def test_flash4_is_bound_where_it_is_right(knobs, bound, flash4):
    """In every form that the model has; where it is not, what is bound instead, and why."""
    assert bound(**knobs)[:2] == (t.attend_flash4, "flash4")
    forms = {(c["bounds"] is not None, c["causal"]) for c in flash4.calls}
    dense = {("doc_mask" in knobs, True)}
    assert forms == dense | ({("doc_mask" in knobs, False)} if "attn_windows" in knobs else set())
    flash4.wrong = 0.3
    rest = "flash+mem_efficient" if knobs else "flash"  # of a CPU
    assert bound(**knobs)[:2] == (t.attend_sdpa, rest + ",flash4:torch(error0.300)")
    flash4.wrong, flash4.forward = 0.0, lambda *args, **how: 1 / 0
    assert bound(**knobs)[:2] == (t.attend_sdpa, rest + ",flash4:torch(ZeroDivisionError)")


@pytest.mark.parametrize("wrong", ["windowed", "causal"])
def test_one_wrong_form_is_enough_against_flash4(wrong, bound, flash4):
    real = flash4.weights
    hide = lambda causal: dict(windowed=not causal, causal=causal)[wrong]
    flash4.weights = lambda q, k, causal, left, right: (
        real(q, k, causal, left, right) * (2 if hide(right is None) else 1)
    )
    assert (bound()[1] == "flash4") == (wrong == "windowed")
    attend, name, _ = bound(**MASKS[0])
    assert attend is t.attend_sdpa and name.startswith("flash+mem_efficient,flash4:torch(error")
    assert (bound(attn_windows="512")[1] == "flash4") == (wrong == "causal")


@pytest.mark.gpu
@pytest.mark.parametrize("heads_of", [(8, 4, 64), (4, 4, 128)], ids=str)
@pytest.mark.parametrize(
    "window,own", [(0, False), (100, False), (0, True), (100, True), (512, True), (1, False), (2, True)]
)
def test_flash4_on_the_device_is_the_torch_line_in_float32(window, own, heads_of):
    """With a window of one, no gradient reaches q and k: theirs are held to dv's size."""
    pytest.importorskip("flash_attn.cute.interface")
    tokens = torch.randint(2, 500, (3, 512), generator=torch.Generator().manual_seed(2))
    tokens[torch.rand(3, 512, generator=torch.Generator().manual_seed(3)) < 0.03] = 1
    tokens[2] = 1
    how = dict(window=window, docs=t.documents(tokens.to(DEVICE), 1) if own else None)
    qkv = heads(3, 512, *heads_of, dtype=torch.bfloat16)
    got = with_gradients(t.attend_flash4, qkv, **how)
    want = with_gradients(t.attend_sdpa, [x.detach().float() for x in qkv], **how)
    for a, b in zip(got, want):
        assert (a.float() - b).norm() < 0.01 * (want[-1] if window == 1 else b).norm()


@pytest.mark.gpu
def test_a_compiled_model_with_masks_trains_on_the_device():
    pytest.importorskip("flash_attn.cute.interface")
    h = t.load_config(
        ["num_layers=2", "attn_windows=100 0", "doc_mask=1", "train_seq_len=512", "xsa_last_n=1"], {}
    )
    ops, names = t.bind_ops(h, DEVICE)
    assert ops.attend is t.attend_flash4, names
    x, y = random_tokens(h, (2, 4, 512), 3, bos_share=0.02).to(DEVICE)
    losses = []
    for attend, dtype in ((t.attend_flash4, torch.bfloat16), (t.attend_sdpa, torch.float32)):
        model = t.GPT(h, t.Ops(attend=attend), dtype).to(DEVICE)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(DEVICE))
        loss = torch.compile(model.loss, dynamic=False, fullgraph=True)(x, y)
        loss.backward()
        losses.append(loss.item())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
