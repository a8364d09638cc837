"""The model in sections: each a function with its inputs, its calls in a pass and the least work it takes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.shared.timing import call_ms, fresh_sets, in_turn
from lab.shared.trainer import (
    DOCUMENTS_PER_SEQUENCE,
    Session,
    bank_shapes,
    blocks_of,
    documents_of,
    loss_from_trunk,
    one_layer_model,
    rope_of,
)
from older_scripts import is_reference_qk, is_serial, setting

OUTPUT_LAYER = "output layer + softcap + cross-entropy"  # its output is one number
ID_BYTES = 8  # of a token id
TABLE_BYTES = 4  # of a number in an embedding table
ATTENTION_BACKWARD = 2.5  # products of attention's backward over those of its forward: five for two


class Product(NamedTuple):
    """Floating point operations at the rate of a matrix product of this shape (m, k, n); None: the best."""

    flops: float
    shape: tuple[int, int, int] | None


class Work(NamedTuple):
    """The least that one call takes: bytes read and written, each input and output once, and its products."""

    moved: float = 0.0
    products: tuple[Product, ...] = ()

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.products)


class BothWork(NamedTuple):
    """The work of a forward and of its backward."""

    forward: Work
    backward: Work


class OwnBackward(NamedTuple):
    """A backward to time in place of autograd's."""

    fn: Callable
    inputs: Callable[[], list[Tensor]]


class Section(NamedTuple):
    """A piece of the model. Its gradients are those of `params` and of the inputs that require them."""

    name: str
    count: int  # calls in a pass; 0: a composite, built for candidates only
    fn: Callable
    inputs: Callable[[], list[Tensor]]  # makes the arguments of fn
    work: BothWork  # the least that a call takes
    uses: tuple[str, ...] = ()  # functions of the script that it calls and that a candidate may replace
    params: tuple[Tensor, ...] = ()
    compiled: bool = True
    back: OwnBackward | None = None  # if its backward in the model is not autograd's backward of fn


# ---- work ----------------------------------------------------------------------------------------


def matmul(m: int, k: int, n: int, times: int = 1) -> Product:
    """Count `times` products of (m, k) and (k, n)."""
    return Product(times * 2.0 * m * k * n, (m, k, n))


def linear_work(m: int, k: int, n: int, size: int) -> BothWork:
    """Return the work of F.linear on (m, k) and (n, k), `size` bytes a number."""
    moved = size * (m * k + k * n + m * n)
    more = size * (m * k + k * n)
    return BothWork(
        forward=Work(moved, (matmul(m, k, n),)),
        backward=Work(moved + more, (matmul(m, k, n, times=2),)),
    )


def mlp_work(rows: int, D: int, hidden: int, size: int) -> BothWork:
    """Return the work of the MLP: its hidden layer is written and read once, its gradient too."""

    def work(streams: int, matrices: int, times: int) -> Work:
        moved = size * (streams * rows * (D + hidden) + matrices * D * hidden)
        return Work(moved, (matmul(rows, D, hidden, times), matmul(rows, hidden, D, times)))

    return BothWork(
        forward=work(streams=2, matrices=2, times=1),
        backward=work(streams=3, matrices=4, times=2),
    )


def lookup_work(rows: int, table_numbers: int, out_bytes: int, k: int, n: int) -> BothWork:
    """Return the work of looking up `rows` ids in tables and projecting from k to n.

    With k = 0 there is no projection.
    """
    ids = ID_BYTES * rows
    tables = TABLE_BYTES * table_numbers
    return BothWork(
        forward=Work(ids + tables + out_bytes, (matmul(rows, k, n),)),
        backward=Work(ids + 2 * tables + out_bytes, (matmul(rows, k, n, times=2),)),
    )


# ---- sections ------------------------------------------------------------------------------------


class Pieces:
    """Makes the sections of one script, with its `ops`, computing in `dtype`. Shapes are a micro-batch's.

    Functions that are compiled close over locals, not over self: the compiler guards whatever they reach.
    """

    def __init__(self, s: Session, t: ModuleType, ops: Any, dtype: torch.dtype) -> None:
        self.s = s
        self.t = t
        self.h = s.h
        self.ops = ops
        self.dtype = dtype
        self.model = one_layer_model(s, t, ops, dtype)
        self.layers = t.layer_table(s.h)

        self.B = s.sequences
        self.T = s.h.train_seq_len
        self.tokens = self.B * self.T
        self.size = s.m.dtype.itemsize  # bytes of an activation
        self.stream = self.size * self.tokens * s.h.model_dim  # bytes of (B, T, D)
        self.queries_keys = self.size * self.tokens * (s.h.model_dim + s.h.kv_dim)

    # ---- inputs

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw random numbers that require gradients, of the compute dtype unless told."""
        drawn = torch.randn(shape, device=self.s.m.device, dtype=dtype or self.dtype)
        return drawn.requires_grad_()

    def activations(self) -> Tensor:
        """Draw (B, T, D)."""
        return self.draw(self.B, self.T, self.h.model_dim)

    def heads(self, count: int) -> Tensor:
        """Draw (B, T, count, Dh)."""
        return self.draw(self.B, self.T, count, self.h.head_dim)

    def values(self) -> Tensor:
        """Draw v as the model has it, a view of the product QKV: (B, T, Hkv, Dh)."""
        D = self.h.model_dim
        kv = self.h.kv_dim
        qkv = torch.randn(self.B, self.T, D + 2 * kv, device=self.s.m.device, dtype=self.dtype)
        v = qkv[..., D + kv :].view(self.B, self.T, self.h.num_kv_heads, self.h.head_dim)
        return v.detach().requires_grad_()

    def vector(self, *shape: int) -> Tensor:
        """Draw a control tensor, in the dtype in which the model stores its parameters."""
        return self.draw(*shape, dtype=self.model.tok_emb.dtype)

    def ids(self) -> Tensor:
        """Draw token ids, (B, T)."""
        return torch.randint(self.h.vocab_size, (self.B, self.T), device=self.s.m.device)

    # ---- pieces, in the order of a forward

    def embedding(self) -> Section:
        """Make the section of the token embedding with bigrams, if there are any, and SmearGate."""
        h = self.h
        m = self.model
        numbers = h.vocab_size * h.model_dim
        projected = 0
        params = [m.tok_emb, m.smear_gate]
        if h.bigram_vocab_size:
            numbers += h.bigram_vocab_size * h.bigram_dim
            projected = h.bigram_dim
            params += [m.bigram_emb, m.bigram_proj, m.bigram_scale]
        return Section(
            "embedding + bigram + smear" if h.bigram_vocab_size else "embedding + smear",
            1,
            m.embed,
            lambda: [self.ids()],
            work=lookup_work(self.tokens, numbers, self.stream, projected, h.model_dim),
            uses=("GPT.embed", "rms_norm"),
            params=(*params,),
        )

    def value_embedding(self) -> Section:
        """Make the section of the token embedding that the last layers add to their values."""
        h = self.h
        m = self.model
        dtype = self.dtype

        def embed(ids: Tensor) -> Tensor:
            values = F.embedding(ids, m.ve_emb).to(dtype)
            return F.linear(values, (m.ve_scale * m.ve_proj).to(dtype))

        out = self.size * self.tokens * h.kv_dim
        return Section(
            "value embedding",
            1,
            embed,
            lambda: [self.ids()],
            work=lookup_work(self.tokens, h.vocab_size * h.ve_dim, out, h.ve_dim, h.kv_dim),
            params=(m.ve_emb, m.ve_proj, m.ve_scale),
        )

    def residual_mix(self) -> Section:
        """Make the section that mixes the embedding into the residual stream and normalizes it."""
        t = self.t

        def mix_norm(x: Tensor, y: Tensor, x0: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
            x = t.residual_mix(x + y, x0, mix)  # x + y ends the layer before
            return x, t.rms_norm(x)

        def inputs() -> list[Tensor]:
            return [*(self.activations() for _ in range(3)), self.vector(2, self.h.model_dim)]

        return Section(
            "residual mix + norm",
            len(self.layers),
            mix_norm,
            inputs,
            work=BothWork(forward=Work(5 * self.stream), backward=Work(7 * self.stream)),
            uses=("residual_mix", "rms_norm"),
        )

    def product(self, name: str, n: int) -> Section:
        """Make the section of a linear map from D to n, a library's kernel: there is nothing to compile."""
        D = self.h.model_dim

        def inputs() -> list[Tensor]:
            return [self.draw(self.B, self.T, D), self.draw(n, D)]

        work = linear_work(self.tokens, D, n, self.size)
        return Section(name, len(self.layers), F.linear, inputs, work=work, compiled=False)

    def queries_and_keys(self) -> Section:
        """Make the section between the product and attention: norm, rope and gain."""
        h = self.h
        ops = self.ops
        rope = rope_of(self.s, self.t)
        kv_bytes = self.size * self.tokens * h.kv_dim

        def inputs() -> list[Tensor]:
            return [self.heads((h.model_dim + 2 * h.kv_dim) // h.head_dim), self.vector(h.num_heads)]

        return Section(
            "QK norm + rope + gain",
            len(self.layers),
            lambda qkv, gain: ops.qk(qkv, gain, *rope),
            inputs,
            work=BothWork(
                forward=Work(2 * self.queries_keys),
                backward=Work(3 * self.queries_keys + 2 * kv_bytes),
            ),
            uses=("qk_heads", "qk_norm_rope", "rms_norm"),
            # a fused one, compiled alone, would get v's gradient outside: v is a view of this section's input
            compiled=is_reference_qk(self.t, ops.qk),
        )

    def attention(self, window: int) -> Section:
        """Make the section of attention in the layers of one window; 0: those without."""
        h = self.h
        ops = self.ops
        documents = documents_of(self.s)
        longest = self.T // DOCUMENTS_PER_SEQUENCE if h.doc_mask else self.T
        seen = min(window or longest, longest)
        fraction = 1 - seen / longest / 2  # the first tokens of a document see fewer keys
        flops = 4.0 * self.tokens * h.model_dim * seen * fraction  # both products

        def inputs() -> list[Tensor]:
            return [self.heads(h.num_heads), self.heads(h.num_kv_heads), self.values()]

        return Section(
            f"attention, window {window}" if window else "attention",
            sum(spec.window == window for spec in self.layers),
            lambda q, k, v: ops.attend(q, k, v, window, documents),
            inputs,
            work=BothWork(
                forward=Work(2 * self.queries_keys, (Product(flops, None),)),
                backward=Work(4 * self.queries_keys, (Product(ATTENTION_BACKWARD * flops, None),)),
            ),
            uses=("attend_sdpa", "attend_flash4"),
            compiled=h.doc_mask or window > 0,
        )

    def exclusion(self) -> Section:
        """Make the section that takes a token's own value out of its attention: XSA."""

        def inputs() -> list[Tensor]:
            return [self.heads(self.h.num_heads), self.values()]

        return Section(
            "XSA",
            sum(spec.xsa for spec in self.layers),
            self.t.exclude_self,
            inputs,
            work=BothWork(
                forward=Work(self.stream + self.queries_keys),
                backward=Work(self.stream + 2 * self.queries_keys),
            ),
            uses=("exclude_self",),
        )

    def head_gates(self) -> Section:
        """Make the section of the gates on the outputs of the heads."""
        h = self.h
        dims = h.attn_gate_dims

        def inputs() -> list[Tensor]:
            return [self.heads(h.num_heads), self.activations(), self.vector(h.num_heads, dims)]

        first = self.size * self.tokens * dims  # bytes of the first dimensions of the layer's input
        forward = Work(2 * self.stream + first, (matmul(self.tokens, dims, h.num_heads),))
        backward = Work(3 * self.stream + 2 * first, (matmul(self.tokens, dims, h.num_heads, times=2),))
        return Section(
            "head gates",
            len(self.layers),
            self.t.gate_heads,
            inputs,
            work=BothWork(forward, backward),
            uses=("gate_heads",),
        )

    def residual_add(self) -> Section:
        """Make the section that adds to the residual stream and normalizes it."""
        t = self.t

        def add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x = x + y
            return x, t.rms_norm(x)

        def inputs() -> list[Tensor]:
            return [self.activations(), self.activations()]

        return Section(
            "residual add + norm",
            sum(map(is_serial, self.layers)),
            add_norm,
            inputs,
            work=BothWork(forward=Work(4 * self.stream), backward=Work(4 * self.stream)),
            uses=("rms_norm",),
        )

    def mlp(self) -> Section:
        """Make the section of an MLP, activation included."""
        D = self.h.model_dim
        hidden = self.h.mlp_dim

        def inputs() -> list[Tensor]:
            return [self.activations(), self.draw(hidden, D), self.draw(D, hidden)]

        work = mlp_work(self.tokens, D, hidden, self.size)
        return Section("MLP", len(self.layers), self.ops.mlp, inputs, work=work, uses=("mlp",))

    def skip_adds(self) -> Section:
        """Make the section in which a layer adds what an earlier one kept."""
        t = self.t
        vectors = 2 if setting(self.h, "skip_gates") else 1

        def add(x: Tensor, kept: Tensor, w: Tensor, gate: Tensor | None = None) -> Tensor:
            if gate is None:
                return x + w.to(x.dtype) * kept
            return t.take_skip(x, kept, w, gate)

        def inputs() -> list[Tensor]:
            given = [self.vector(self.h.model_dim) for _ in range(vectors)]
            return [self.activations(), self.activations(), *given]

        return Section(
            "skip adds",
            sum(spec.skip >= 0 for spec in self.layers),
            add,
            inputs,
            work=BothWork(forward=Work(3 * self.stream), backward=Work((2 + vectors) * self.stream)),
        )

    def stream_mix(self) -> Section:
        """Make the section in which a layer of two streams writes to both."""

        def inputs() -> list[Tensor]:
            return [*(self.activations() for _ in range(4)), self.vector(2), self.vector(2, 2)]

        return Section(
            "stream mix",
            sum(spec.form == "two_streams" for spec in self.layers),
            self.t.mix_streams,
            inputs,
            work=BothWork(forward=Work(6 * self.stream), backward=Work(10 * self.stream)),
        )

    def output_layer(self) -> Section:
        """Make the section from the last layer's stream to the loss."""
        D = self.h.model_dim
        V = self.h.vocab_size
        ids = ID_BYTES * self.tokens
        weights = TABLE_BYTES * V * D
        forward = Work(ids + weights + self.stream, (matmul(self.tokens, D, V),))
        backward = Work(ids + 2 * weights + 2 * self.stream, (matmul(self.tokens, D, V, times=2),))
        return Section(
            OUTPUT_LAYER,
            1,
            loss_from_trunk(self.t, self.model),
            lambda: [self.activations(), self.ids()],
            work=BothWork(forward, backward),
            uses=("GPT.nats", "GPT.unembed", "GPT.loss", "rms_norm"),
            params=(self.model.tok_emb,),
        )

    def bank_casts(self) -> Section:
        """Make the casts of banks to the compute dtype; backward adds the layers' gradients to float32."""
        shapes = bank_shapes(self.s)
        numbers = sum(count * rows * columns for count, rows, columns in shapes)
        dtype = self.dtype

        def cast(*banks: Tensor) -> list[Tensor]:
            return [bank.to(dtype) for bank in banks]

        def accumulate(*tensors: Tensor) -> tuple[Tensor, ...]:
            grads = tensors[: len(shapes)]
            slices = tensors[len(shapes) :]
            for grad in grads:
                grad.add_(torch.stack(slices[: len(grad)]))
                slices = slices[len(grad) :]
            return grads

        def make(shape: tuple, of: torch.dtype) -> Tensor:
            return torch.randn(shape, device=self.s.m.device, dtype=of)

        def banks() -> list[Tensor]:
            return [make(shape, torch.float32) for shape in shapes]

        def banks_and_gradients() -> list[Tensor]:
            return banks() + [make(shape[1:], dtype) for shape in shapes for _ in range(shape[0])]

        read_and_written = numbers * (TABLE_BYTES + self.size)
        work = BothWork(
            forward=Work(0 if dtype == torch.float32 else read_and_written),
            backward=Work(read_and_written + numbers * TABLE_BYTES),
        )
        own = OwnBackward(accumulate, banks_and_gradients)
        return Section("bank casts", 1, cast, banks, work=work, back=own)

    def forward_sections(self) -> list[Section]:
        """Make the sections of a forward pass in its order."""
        D = self.h.model_dim
        kv = self.h.kv_dim
        windows = sorted({spec.window for spec in self.layers})
        return [
            self.embedding(),
            *([self.value_embedding()] if self.h.ve_last_n else []),
            self.residual_mix(),
            self.product("QKV product", D + 2 * kv),
            self.queries_and_keys(),
            *map(self.attention, windows),
            self.exclusion(),
            *([self.head_gates()] if setting(self.h, "attn_gate_dims") else []),
            self.product("O product", D),
            self.residual_add(),
            self.mlp(),
            *([self.stream_mix()] if setting(self.h, "two_stream_layers") else []),
            self.skip_adds(),
            self.output_layer(),
        ]

    # ---- composites

    def composites(self, sections: list[Section]) -> list[Section]:
        """Make blocks of several sections, with their products: a candidate may replace a whole block."""
        D = self.h.model_dim
        blocks = blocks_of(self.s, self.t, self.ops, self.model)
        by_name = {section.name: section for section in sections}
        attend = f"attention, window {blocks.window}" if blocks.window else "attention"
        attention_parts = [by_name[name] for name in ("QKV product", attend, "O product")]
        layer_parts = [*attention_parts, by_name["MLP"]]
        attention_numbers = 4 * D * D
        layer_numbers = attention_numbers + 2 * D * self.h.mlp_dim

        def work(streams: int, matrix_numbers: int, works: list[Work]) -> Work:
            products = [product for one in works for product in one.products]
            return Work(streams * self.stream + self.size * matrix_numbers, tuple(products))

        attention = Section(
            "attention block",
            0,
            blocks.attention,
            lambda: [self.activations(), *blocks.weights()],
            work=BothWork(
                forward=work(2, attention_numbers, [part.work.forward for part in attention_parts]),
                backward=work(3, 2 * attention_numbers, [part.work.backward for part in attention_parts]),
            ),
            uses=("attention_block",),
        )
        layer = Section(
            "layer",
            0,
            blocks.layer,
            lambda: [self.activations(), self.activations(), *blocks.weights()],
            work=BothWork(
                forward=work(3, layer_numbers, [part.work.forward for part in layer_parts]),
                backward=work(5, 2 * layer_numbers, [part.work.backward for part in layer_parts]),
            ),
            uses=("residual_mix", "attention_block", "mlp"),
        )
        return [attention, layer]


def sections_of(s: Session, t: ModuleType, ops: Any, dtype: torch.dtype) -> list[Section]:
    """Make the model's sections in the order of a forward, then the composites that candidates replace."""
    pieces = Pieces(s, t, ops, dtype)
    sections = pieces.forward_sections()
    try:
        composites = pieces.composites(sections)
    except Exception as error:  # a script whose blocks have other parameters still has its sections
        s.skip("blocks", error)
        composites = []
    return [*sections, pieces.bank_casts(), *composites]


# ---- timing --------------------------------------------------------------------------------------


class SectionTime(NamedTuple):
    """ms of one call. backward: forward + backward less forward."""

    forward: float
    backward: float


def as_list(out: Any) -> list[Tensor]:
    """Return a function's result as a list of tensors."""
    return [out] if isinstance(out, Tensor) else list(out)


def leaves_of(section: Section, args: list[Tensor]) -> list[Tensor]:
    """Return the arguments and parameters of a section that get gradients."""
    return [x for x in (*args, *section.params) if x.requires_grad]


@torch.no_grad()
def time_own_backward(s: Session, section: Section) -> SectionTime:
    """Time a section and the function that stands for its backward."""

    def ms(which: str, fn: Callable, make: Callable[[], list[Tensor]]) -> float:
        compiled = s.m.compile(fn)
        calls = in_turn(s, lambda args: compiled(*args), fresh_sets(s, make))
        return call_ms(s, f"{section.name} {which}", calls)

    return SectionTime(ms("forward", section.fn, section.inputs), ms("backward", *section.back))


class SectionCall(NamedTuple):
    """Arguments of a section, which tensors get gradients, and the gradients of its outputs."""

    args: list[Tensor]
    leaves: list[Tensor]
    output_gradients: list[Tensor]


def gradient_of_output(out: Tensor) -> Tensor:
    """Draw a contiguous gradient of an output; that of one number is one."""
    if out.dim() == 0:
        return torch.ones_like(out)
    return torch.randn(out.shape, device=out.device, dtype=out.dtype)


def time_section(s: Session, section: Section) -> SectionTime:
    """Time one call of a section, forward and backward."""
    if section.back is not None:
        return time_own_backward(s, section)

    fn = s.m.compile(section.fn) if section.compiled else section.fn
    outs = as_list(fn(*section.inputs()))
    calls = [
        SectionCall(args, leaves_of(section, args), [gradient_of_output(out) for out in outs])
        for args in fresh_sets(s, section.inputs)
    ]
    del outs

    def forward(call: SectionCall) -> None:
        fn(*call.args)

    def both(call: SectionCall) -> None:
        outs = as_list(fn(*call.args))
        torch.autograd.grad(outs, call.leaves, call.output_gradients, allow_unused=True)

    whole_ms = call_ms(s, f"{section.name} forward+backward", in_turn(s, both, calls))
    forward_ms = call_ms(s, f"{section.name} forward", in_turn(s, forward, calls))
    return SectionTime(forward_ms, max(whole_ms - forward_ms, 0.0))
