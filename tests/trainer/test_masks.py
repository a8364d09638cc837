"""Attention windows and document masks: who sees whom, the arguments of FlashAttention-4, kernels bound."""

import dataclasses
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

import train_gpt as t
from tests.helpers import gaussian, noisy_model, random_tokens, tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# (window, whether tokens see their own document only), for sequences of 16 tokens.
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
]


def sees(i, j, window, documents):
    """Return whether token i sees token j. documents: the documents of one sequence, or None."""
    return j <= i and (not window or i - j < window) and (documents is None or documents[i] == documents[j])


def attention_by_hand(q, k, v, window=0, documents=None):
    """Compute attention one query and one head at a time."""
    out = torch.zeros_like(q)
    groups = q.size(2) // k.size(2)
    for b, i, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        own = None if documents is None else documents[b]
        keys = [j for j in range(q.size(1)) if sees(i, j, window, own)]
        scores = k[b, keys, h // groups] @ q[b, i, h] / math.sqrt(q.size(3))
        out[b, i, h] = scores.softmax(0) @ v[b, keys, h // groups]
    return out


def heads(B, T, H, kv, Dh, dtype=torch.float32, device=DEVICE, seed=0):
    """Return q, k and v that require gradients; v is a slice of a wider product, as in the model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randn(B, T, count, Dh, generator=generator).to(device, dtype)

    return [draw(H).requires_grad_(), draw(kv).requires_grad_(), draw(2 * kv)[:, :, kv:].requires_grad_()]


def with_gradients(fn, qkv, **options):
    """Return fn's output and the gradients of q, k and v for a fixed gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    y = fn(*leaves, **options)
    y.backward(torch.arange(y.numel(), device=y.device).sin().view_as(y).to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves)]


# ---------------------------------------------------------------- FlashAttention-4, on a CPU


class Flash4:
    """A stand-in for flash_attn.cute.interface of flash-attn-4 4.0.0b36, sequence by sequence, on a CPU.

    calls: the arguments of each call. wrong: the relative error of its output.
    """

    def __init__(self):
        self.calls = []
        self.wrong = 0.0

    def each(self, tensors, bounds):
        """Return the sequences of a dense or a ragged batch, without the empty ones."""
        q, k = tensors[:2]
        assert (q.dim(), q.size(-2) % k.size(-2)) == (4 if bounds is None else 3, 0)
        if bounds is None:
            return list(zip(*tensors))
        cuts = bounds.tolist()
        assert cuts == sorted(cuts)
        assert cuts[0] == 0
        assert cuts[-1] == len(q)
        assert bounds.dtype == torch.int32
        return [[x[a:b] for x in tensors] for a, b in zip(cuts, cuts[1:]) if a < b]

    def weights(self, q, k, causal, left, right):
        """Return the attention weights of one sequence, (H, T, T); k has H heads."""
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (back < 0) & (causal or right == 0)
        if left is not None:
            hidden |= back > left
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.size(-1) ** -0.5
        return scores.masked_fill(hidden, -math.inf).softmax(-1)

    def one(self, q, k, v, *mask):
        """Compute the attention of one sequence."""
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1).float() for x in (k, v))
        return torch.einsum("hqk,khd->qhd", self.weights(q.float(), k, *mask), v).to(q.dtype)

    def one_back(self, q, k, v, dout, *mask):
        """Compute the gradients of one sequence by hand: a kernel is below autograd."""
        groups = k.size(1)
        dtype = q.dtype
        scale = q.size(-1) ** -0.5
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1).float() for x in (k, v))
        q = q.float()
        dout = dout.float()
        w = self.weights(q, k, *mask)
        dw = torch.einsum("qhd,khd->hqk", dout, v)
        ds = w * (dw - (w * dw).sum(-1, keepdim=True)) * scale
        dq = torch.einsum("hqk,khd->qhd", ds, k)
        dk = torch.einsum("hqk,qhd->khd", ds, q)
        dv = torch.einsum("hqk,qhd->khd", w, dout)
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
        return [x.to(dtype) for x in (dq, dk, dv)]

    def forward(
        self,
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        causal=False,
        window_size_left=None,
        return_lse=False,
    ):
        """Stand in for _flash_attn_fwd. With a window the package turns `causal` off, sets its right end."""
        assert causal
        assert return_lse
        assert cu_seqlens_q is cu_seqlens_k
        right = None if window_size_left is None else 0
        call = dict(
            q=q,
            v=v,
            bounds=cu_seqlens_q,
            longest=(max_seqlen_q, max_seqlen_k),
            causal=right is None,
            window=(window_size_left, right),
        )
        self.calls.append(call)
        join = torch.stack if cu_seqlens_q is None else torch.cat
        sequences = self.each((q, k, v), cu_seqlens_q)
        out = join([self.one(*x, causal, window_size_left, right) for x in sequences])
        lse = q[..., 0].mT.contiguous().float()  # any numbers: backward must get them again
        return out * (1 + self.wrong), lse, None, None, None

    def backward(
        self,
        q,
        k,
        v,
        out,
        dout,
        lse,
        causal=False,
        window_size_left=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        deterministic=False,
    ):
        """Stand in for _flash_attn_bwd."""
        assert causal
        assert dout.is_contiguous()
        assert out.shape == dout.shape == q.shape
        assert torch.equal(lse, q[..., 0].mT.float())  # forward's
        assert (max_seqlen_q, max_seqlen_k) == self.calls[-1]["longest"]
        assert cu_seqlens_q is cu_seqlens_k
        self.calls[-1]["deterministic"] = deterministic
        right = None if window_size_left is None else 0
        join = torch.stack if cu_seqlens_q is None else torch.cat
        sequences = self.each((q, k, v, dout), cu_seqlens_q)
        grads = [self.one_back(*x, causal, window_size_left, right) for x in sequences]
        return tuple(join(x) for x in zip(*grads))


@pytest.fixture
def flash4(monkeypatch):
    """Install a stand-in for the package and return it."""
    stand_in = Flash4()
    module = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd = lambda *args, **named: stand_in.forward(*args, **named)
    module._flash_attn_bwd = lambda *args, **named: stand_in.backward(*args, **named)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return stand_in


@pytest.mark.parametrize("window,own", KINDS)
def test_the_reference_is_attention_by_hand(window, own):
    qkv = heads(2, 16, 4, 2, 8, torch.float64, torch.device("cpu"))
    documents = t.number_documents(random_tokens(tiny(), (2, 16), 1, bos_share=0.2), 1) if own else None
    expected = attention_by_hand(*qkv, window, documents)
    # Measured: 6.7e-16.
    torch.testing.assert_close(t.attend_sdpa(*qkv, window, documents), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("window,own", [*KINDS, (0, False), (16, True)])
def test_flash4_is_the_reference(window, own, flash4):
    tokens = random_tokens(tiny(), (4, 16), 1, bos_share=0.3)
    tokens[1] = 1
    tokens[2] = 5
    tokens[3, [0, 15]] = 1
    options = dict(window=window, documents=t.number_documents(tokens, 1) if own else None)
    qkv = [x.cpu() for x in heads(4, 16, 4, 2, 8)]
    found = with_gradients(t.attend_flash4, qkv, **options)
    for got, expected in zip(found, with_gradients(t.attend_sdpa, qkv, **options)):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)  # measured: 30 % of that

    (call,) = flash4.calls
    assert (call["bounds"] is not None) == own
    assert call["longest"] == ((16, 16) if own else (None, None))
    assert call["window"] == ((window - 1, 0) if 0 < window < 16 else (None, None))
    assert not call["deterministic"]


def test_the_fake_flash4_is_the_operator(flash4):
    """Check dense batches and sequences of unequal length, forward and backward."""
    checks = ("test_schema", "test_faketensor")
    dense = [x.detach() for x in heads(2, 9, 4, 2, 8, torch.bfloat16, "cpu")]
    ragged = [x.flatten(0, 1) for x in dense]
    for qkv, bounds in ((dense, None), (ragged, torch.tensor([0, 5, 5, 9, 18], dtype=torch.int32))):
        arguments = (qkv, bounds, 9, 3)
        out, lse = t.flash4_op(*arguments)
        back = [out, torch.randn_like(out), lse]
        torch.library.opcheck(t.flash4_op, arguments, test_utils=checks)
        torch.library.opcheck(t.flash4_backward_op, (*arguments, back), test_utils=checks)


def test_flash4_is_deterministic_on_request(flash4):
    torch.use_deterministic_algorithms(True)
    try:
        with_gradients(t.attend_flash4, [x.cpu() for x in heads(1, 16, 2, 1, 8)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash4.calls[0]["deterministic"]


def test_the_arguments_of_flash4(flash4):
    """Make as many sequences of documents whatever the tokens are, and copy none of them.

    A window that hides nothing is no window.
    """
    B = 3
    T = 40
    tokens = torch.arange(7, 47).repeat(B, 1)
    tokens[0, [3, 4, 30]] = 1
    tokens[1, 2::2] = 1  # 19 starts and that of the sequence
    q, k, v = (x.cpu() for x in heads(B, T, 4, 2, 8))
    documents = t.number_documents(tokens, 1)
    for window in (0, 6):
        t.attend_flash4(q, k, v, window, documents)
        call = flash4.calls.pop()
        bounds = call["bounds"].tolist()
        assert len(bounds) == B * t.MAX_DOCUMENTS + 1
        expected = [0, 3, 4, 30, *range(40, 40 + 2 * t.MAX_DOCUMENTS, 2), 80, 120]
        assert sorted(set(bounds)) == expected and bounds == sorted(bounds)
        assert call["longest"] == (T, T) and call["q"].shape == (B * T, 4, 8)
        assert call["v"].data_ptr() == v.data_ptr() and call["v"].stride() == v.stride()[1:]
        assert (call["causal"], call["window"]) == ((False, (5, 0)) if window else (True, (None, None)))

    for window in (6, 0, T, T + 1):
        torch.testing.assert_close(t.attend_flash4(q, k, v, window), t.attend_sdpa(q, k, v, window))
        call = flash4.calls.pop()
        assert call["bounds"] is None and call["q"].shape == (B, T, 4, 8)
        assert (call["causal"], call["window"]) == ((False, (5, 0)) if window == 6 else (True, (None, None)))


def test_one_graph_trains_like_the_reference(flash4):
    """Compile a model around the operator: no graph break, the same loss and gradients, bounds made once."""
    h = tiny(attn_windows="4 0", doc_mask=True)
    model = noisy_model(h, scale=0.3)
    reference = noisy_model(h, scale=0.3)
    model.ops = t.Ops(attend=t.attend_flash4)
    tokens, targets = random_tokens(h, (2, 2, 16), 3, bos_share=0.2)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        return aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)(graph, inputs)

    loss = torch.compile(model.loss, dynamic=False, fullgraph=True, backend=backend)(tokens, targets)
    expected = reference.loss(tokens, targets)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)  # measured: 0
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)  # measured: 2 % of that

    assert len(graphs) == 2
    forward, backward = ([str(node.target) for node in graph.graph.nodes] for graph in graphs)
    for names in (forward, backward):
        assert sum("flash4" in name for name in names) == h.num_layers
    assert sum("aten.lt." in name for name in forward) == 1, "the bounds are made in every layer"


# ---------------------------------------------------------------- documents, the layer table, the model


def test_documents_are_counted_within_a_sequence():
    tokens = torch.tensor([[5, 5, 1, 5, 1, 1], [1, 5, 5, 5, 5, 1], [5, 5, 5, 5, 5, 5]])
    starts = [[1, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0]]
    assert t.document_starts(tokens, 1).int().tolist() == starts
    assert t.number_documents(tokens, 1).tolist() == [[0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 0, 1], [0] * 6]
    many = t.number_documents(torch.ones(1, 40, dtype=torch.long), 1)[0].tolist()
    assert many == [*range(t.MAX_DOCUMENTS), *[t.MAX_DOCUMENTS - 1] * (40 - t.MAX_DOCUMENTS)]


@pytest.mark.parametrize(
    "window,keys", [(4, [8, 8]), (2, [4, 4]), (8, [16]), (3, [16]), (16, [16]), (0, [16])]
)
def test_a_window_that_divides_the_sequence_sees_few_keys(window, keys, monkeypatch):
    """Attend in blocks of the window's length, which makes twice as many scores as are seen."""
    found = []
    real = F.scaled_dot_product_attention

    def noted(q, k, v, **options):
        found.append(k.size(2))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    t.attend_sdpa(*heads(2, 16, 4, 2, 8), window)
    assert found == keys


@pytest.mark.parametrize(
    "pattern,windows",
    [("", [0] * 5), ("7", [7] * 5), ("3 0", [3, 0, 3, 0, 3]), (" 5  6 7 8 9 10 ", [5, 6, 7, 8, 9])],
)
def test_a_pattern_is_repeated_over_the_layers(pattern, windows):
    for own in (False, True):
        table = t.layer_table(tiny(num_layers=5, attn_windows=pattern, doc_mask=own))
        assert [(spec.window, spec.doc_mask) for spec in table] == [(window, own) for window in windows]


def moved_by(h, at, tokens, local=True):
    """Return the positions whose logits move when the token at `at` changes.

    local: switch off bigrams and smear, so that a token enters at its own position only.
    """
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
    """Expect it `reach` tokens further, of 16: the sum of the layers' windows, each less one."""
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
    windowed = tiny(doc_mask=True, attn_windows="2", num_layers=1, xsa_last_n=0, ve_last_n=1)
    assert moved_by(windowed, 6, tokens) == [6, 7]


@pytest.mark.parametrize(
    "knobs",
    [dict(attn_windows="3"), dict(doc_mask=True), dict(attn_windows="3 0", doc_mask=True)],
    ids=str,
)
def test_a_mask_changes_the_loss_and_not_causality(knobs):
    h = tiny(**knobs)
    model = noisy_model(h, scale=0.3)
    unmasked = noisy_model(tiny(), scale=0.3)
    tokens, targets = random_tokens(h, (2, 1, 16), 5, bos_share=0.0)
    tokens[0, [6, 9]] = h.bos_id
    assert (model.loss(tokens, targets) - unmasked.loss(tokens, targets)).abs() > 1e-4
    with torch.no_grad():
        before = model.logits(tokens)
        for cut in range(15):
            changed = tokens.clone()
            changed[0, cut + 1 :] = random_tokens(h, (15 - cut,), 50 + cut, bos_share=0.4)
            assert torch.equal(model.logits(changed)[:, : cut + 1], before[:, : cut + 1]), cut


def test_masks_that_hide_nothing_change_nothing():
    tokens, targets = random_tokens(tiny(), (2, 2, 16), 6, bos_share=0.0)

    def loss(**knobs):
        return noisy_model(tiny(**knobs), scale=0.3).loss(tokens, targets)

    expected = loss()
    for windows in ("16", "17 999999999 0"):
        assert torch.equal(loss(attn_windows=windows), expected)
    for knobs in (dict(doc_mask=True), dict(doc_mask=True, attn_windows="16 0")):
        torch.testing.assert_close(loss(**knobs), expected)


def test_an_artifact_carries_both_knobs():
    h = tiny(attn_windows="4 0", doc_mask=True, num_layers=2)
    tensors = dict(noisy_model(h).named_parameters())
    header, _ = t.open_artifact(t.pack_artifact(tensors, h))
    again = t.make_config({}, header["config"])
    assert (again.attn_windows, again.doc_mask) == ("4 0", True)
    assert t.layer_table(again) == t.layer_table(h)
    header, _ = t.open_artifact(t.pack_artifact(tensors, dataclasses.replace(h, attn_windows="4 -1")))
    with pytest.raises(t.InputError, match="attn_windows='4 -1'"):
        t.make_config({}, header["config"])


# ---------------------------------------------------------------- the kernel that is bound


KERNELS = ("cudnn", "flash", "mem_efficient", "math")
MASKS = [dict(attn_windows="512 0"), dict(doc_mask=1), dict(attn_windows="512 0", doc_mask=1)]


def switches():
    """Return PyTorch's attention kernels that are switched on."""
    return [name for name in KERNELS if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]


class BoundHere(NamedTuple):
    """The attention function that this machine binds, its label, and the kernels switched on."""

    attend: Callable
    label: str
    switches: list[str]


@pytest.fixture
def bound():
    """Return a function of knobs that calls bind_attention here and returns a BoundHere."""

    def bind(**knobs):
        sizes = ["model_dim=64", "num_heads=2", "num_kv_heads=1", "rope_dims=16"]
        given = [f"{key}={value}" for key, value in knobs.items()]
        h = t.load_config([*sizes, "attn_windows=", *given], {})
        found = t.bind_attention(h, DEVICE)
        assert " " not in found.label
        return BoundHere(found.function, found.label, switches())

    return bind


@pytest.mark.parametrize("works", [KERNELS[i:] for i in range(4)], ids=lambda works: works[0])
@pytest.mark.parametrize("knobs", [{}, *MASKS], ids=str)
def test_the_first_kernel_that_runs_is_bound(works, knobs, bound, monkeypatch):
    """Switch on one kernel, and the memory-efficient one for masks; do not mention a missing package."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)

    def attend(q, k, v, window=0, documents=None):
        if not set(switches()) & set(works):
            raise RuntimeError(f"{switches()}")
        return q * k * v

    monkeypatch.setattr(t, "attend_sdpa", attend)
    names = [works[0]]
    if knobs and works[0] != "mem_efficient":
        names.append("mem_efficient")
    assert bound(**knobs) == (attend, "+".join(names), sorted(names, key=KERNELS.index))


def test_no_attention_kernel_is_one_line(bound, monkeypatch):
    monkeypatch.setattr(t, "attend_sdpa", lambda *qkv, **options: 1 / 0)
    with pytest.raises(t.InputError, match="no attention kernel"):
        bound()


def test_attention_bound_here_runs_each_mask(bound, caplog, capfd):
    """Bind for real, several times in a process: no choice switches off what a later one needs."""
    for knobs in (*MASKS, {}, MASKS[1]):
        attend, label, on = bound(**knobs)
        assert label.split("+")[0] in (*KERNELS, "flash4")
        assert label == "flash4" or bool(knobs) == ("mem_efficient" in on)

        window = 9 if "attn_windows" in knobs else 0
        documents = torch.arange(64).expand(2, 64) // 20 if "doc_mask" in knobs else None
        on_device = None if documents is None else documents.to(DEVICE)
        qkv = heads(2, 64, 2, 1, 32, torch.bfloat16)
        found = with_gradients(attend, qkv, window=window, documents=on_device)
        on_host = [x.detach().float().cpu() for x in qkv]
        expected = with_gradients(t.attend_sdpa, on_host, window=window, documents=documents)
        for a, b in zip(found, expected):
            assert (a.float().cpu() - b).norm() / b.norm() < 0.02  # measured: 0.0037
    assert not caplog.records and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("knobs", [{}, *MASKS], ids=str)
def test_flash4_is_bound_where_it_is_right(knobs, bound, flash4):
    """Try it in every form that the model has; where it is wrong, bind another and say why."""
    found = bound(**knobs)
    assert (found.attend, found.label) == (t.attend_flash4, "flash4")
    ragged = "doc_mask" in knobs
    expected = {(ragged, True)}
    if "attn_windows" in knobs:
        expected.add((ragged, False))
    assert {(call["bounds"] is not None, call["causal"]) for call in flash4.calls} == expected

    fallback = "flash+mem_efficient" if knobs else "flash"  # of a CPU
    flash4.wrong = 0.3
    found = bound(**knobs)
    assert (found.attend, found.label) == (t.attend_sdpa, fallback + "(flash4:error_0.300)")
    flash4.wrong = 0.0
    flash4.forward = lambda *args, **named: 1 / 0
    found = bound(**knobs)
    assert (found.attend, found.label) == (t.attend_sdpa, fallback + "(flash4:ZeroDivisionError)")


@pytest.mark.parametrize(
    "missing,said", [("flash_attn", False), ("flash_attn.cute", False), ("cutlass", True)]
)
def test_a_flash4_that_lacks_another_package_says_which(missing, said, bound, flash4):
    """It is optional, so its own absence is no news; half an installation is."""

    def forward(*args, **named):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    flash4.forward = forward
    rejected = f"(flash4:missing_{missing})" if said else ""
    assert bound().label == "flash" + rejected


@pytest.mark.parametrize("wrong", ["windowed", "causal"])
def test_one_wrong_form_is_enough_against_flash4(wrong, bound, flash4):
    real = flash4.weights

    def weights(q, k, causal, left, right):
        form = "causal" if right is None else "windowed"
        return real(q, k, causal, left, right) * (2 if form == wrong else 1)

    flash4.weights = weights
    assert (bound().label == "flash4") == (wrong == "windowed")
    both_forms = bound(**MASKS[0])
    assert both_forms.attend is t.attend_sdpa
    assert both_forms.label.startswith("flash+mem_efficient(flash4:error_")
    assert (bound(attn_windows="512").label == "flash4") == (wrong == "causal")


@pytest.mark.gpu
@pytest.mark.parametrize("heads_of", [(8, 4, 64), (4, 4, 128)], ids=str)
@pytest.mark.parametrize(
    "window,own", [(0, False), (100, False), (0, True), (100, True), (512, True), (1, False), (2, True)]
)
def test_flash4_on_the_device_is_the_reference_in_float32(window, own, heads_of):
    """Hold gradients of q and k to dv's size with a window of one: none reaches them."""
    pytest.importorskip("flash_attn.cute.interface")
    tokens = torch.randint(2, 500, (3, 512), generator=torch.Generator().manual_seed(2))
    tokens[torch.rand(3, 512, generator=torch.Generator().manual_seed(3)) < 0.03] = 1
    tokens[2] = 1
    options = dict(window=window, documents=t.number_documents(tokens.to(DEVICE), 1) if own else None)
    qkv = heads(3, 512, *heads_of, dtype=torch.bfloat16)
    found = with_gradients(t.attend_flash4, qkv, **options)
    expected = with_gradients(t.attend_sdpa, [x.detach().float() for x in qkv], **options)
    for a, b in zip(found, expected):
        assert (a.float() - b).norm() < 0.01 * (expected[-1] if window == 1 else b).norm()


@pytest.mark.gpu
def test_a_compiled_model_with_masks_trains_on_the_device():
    pytest.importorskip("flash_attn.cute.interface")
    knobs = ["num_layers=2", "attn_windows=100 0", "doc_mask=1", "train_seq_len=512", "xsa_last_n=1"]
    h = t.load_config(knobs, {})
    assert t.bind_attention(h, DEVICE) == t.Bound(t.attend_flash4, "flash4")
    tokens, targets = random_tokens(h, (2, 4, 512), 3, bos_share=0.02).to(DEVICE)
    losses = []
    for attend, dtype in ((t.attend_flash4, torch.bfloat16), (t.attend_sdpa, torch.float32)):
        model = t.GPT(h, t.Ops(attend=attend), dtype).to(DEVICE)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.05 * gaussian(*p.shape, seed=i).to(DEVICE))
        loss = torch.compile(model.loss, dynamic=False, fullgraph=True)(tokens, targets)
        loss.backward()
        losses.append(loss.item())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
