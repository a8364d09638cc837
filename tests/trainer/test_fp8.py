"""The MLP's forward in e4m3: operator and gradients, in compiled models, in runs and sweeps; not bound where it is wrong."""

import dataclasses
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from helpers import ROOT, emulate_fp8, english_args, noisy_model, random_tokens, tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = (
    torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
)  # the interpreter's bf16 products are wrong
on_cpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="what a CPU does, or emulates")
SIZES = dict(num_layers=1, xsa_last_n=1, ve_last_n=1, model_dim=64, num_heads=2, num_kv_heads=1, mlp_mult=3.0)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def draws(B, T, D, hidden):
    generator = torch.Generator().manual_seed(T)
    make = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE, DTYPE)
    return t.rms_norm(make(B, T, D)), make(hidden, D) / D**0.5, make(D, hidden) / hidden**0.5


@pytest.fixture(autouse=True)
def interpreter_rounds(monkeypatch):
    """Triton's interpreter loses the carry of a mantissa that it rounds up to the next power of two: PyTorch's instead, with
    NaN, as e4m3 defines it and PyTorch 2.11 gives, for what is too large."""
    if DEVICE.type == "cuda":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return convert(values, source, target, mode)
        x = torch.from_numpy(values.copy())
        return torch.where(x.abs() > 464, torch.nan, x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


# ---------------------------------------------------------------- the operator


@pytest.mark.parametrize("size", [(2, 75, 64, 192), (1, 7, 160, 272), (1, 130, 256, 128)], ids=str)
def test_both_products_are_of_e4m3_copies(size):
    """h is of the float64 product of x's and up's copies, y that of h's and down's; a zero is a zero."""
    x, up, down = draws(*size)
    x, up[5] = x[0], 100 * up[5]  # h of one row saturates
    (x8, _), (up8, a), (down8, b) = t.to_fp8(x, 0.125), t.to_fp8(up), t.to_fp8(down)
    assert up8.float().abs().max() == down8.float().abs().max() == 448
    step = torch.tensor(0.5, device=DEVICE)
    h, y = t.mlp8_op(x8, up8, down8, [0.125 * a, step, b], DTYPE)
    u = x8.double() @ up8.double().T * (0.125 * a.double())
    assert relative(h, F.leaky_relu(u, 0.5).square()) < (1e-6 if DTYPE == torch.float32 else 4e-3)
    h8 = (h.float() / step).clamp(max=448).to(torch.float8_e4m3fn).double()
    assert (h8 == 448).any() and h.dtype == y.dtype == DTYPE
    assert relative(y, h8 @ down8.double().T * (step.double() * b.double())) < (
        1e-6 if DTYPE == torch.float32 else 5e-3
    )
    checks = ("test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(t.mlp8_op, (x8, up8, down8, [0.125 * a, step, b], DTYPE), test_utils=checks)
    nothing, step = t.to_fp8(torch.zeros(16, 32))
    assert not nothing.float().any() and step > 0
    big, _ = t.to_fp8(torch.tensor([1e9, -1e9]), 0.125)
    assert big.tolist() == [448, -448]  # not NaN


def test_its_backward_is_the_one_without():
    """Of the h that forward kept, with the matrices and the input as they were."""
    leaves = [v.clone().requires_grad_() for v in draws(2, 40, 64, 192)]
    y = t.FusedMLP8.apply(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
    y.backward(dy)
    x, up, down = (v.detach().double() for v in leaves)
    (x8, _), (up8, step) = t.to_fp8(leaves[0].detach(), 0.125), t.to_fp8(leaves[1].detach())
    u = x8.double() @ up8.double().T * (0.125 * step.double())
    h, du = F.leaky_relu(u, 0.5).square(), dy.double() @ down * torch.where(u > 0, 2 * u, 0.5 * u)
    exact = du @ up, du.flatten(0, 1).T @ x.flatten(0, 1), dy.double().flatten(0, 1).T @ h.flatten(0, 1)
    for leaf, reference in zip(leaves, exact):
        assert relative(leaf.grad, reference) < (1e-5 if DTYPE == torch.float32 else 0.01)


def test_steps_follow_the_matrices():
    """The error is e4m3's at any size of either matrix, and nothing but zeros comes of zeros."""
    x, up, down = draws(2, 64, 64, 192)
    errors = [
        relative(t.FusedMLP8.apply(x, a * up, b * down), t.mlp(x, a * up, b * down))
        for a, b in ((1, 1), (0.02, 1), (50, 1), (1, 0.02), (1, 50))
    ]
    assert 0.02 < min(errors) and max(errors) < 0.07 and max(errors) < 1.2 * min(errors), errors
    assert not t.FusedMLP8.apply(x, 0 * up, down).any() and not t.FusedMLP8.apply(x, up, 0 * down).any()


# ---------------------------------------------------------------- in a model


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_trains_in_it_and_scores_without(backend, monkeypatch):
    """One graph each: the loss and gradients of the eager one; without gradients those of the MLP without fp8."""
    monkeypatch.setattr(
        t, "bind", lambda fast, reference, inputs, name="triton", limit=0.01: t.Bound(fast, name)
    )
    h = tiny(**SIZES | dict(num_layers=2), fp8=1)
    ops, names = t.bind_ops(h, DEVICE)
    models = [noisy_model(h).to(DEVICE) for _ in range(3)]
    for model, fn in zip(models, (ops.mlp, ops.mlp, t.FusedMLP.apply)):
        model.ops, model.dtype = t.Ops(mlp=fn), DTYPE
    x, y = random_tokens(h, (2, 2, 16)).to(DEVICE)
    compiled = torch.compile(models[0].loss, dynamic=False, fullgraph=True, backend=backend)
    losses = [fn(x, y) for fn in (compiled, models[1].loss, models[2].loss)]
    for loss in losses:
        loss.backward()
    assert (
        names["mlp"] == "triton+fp8"
        and abs(losses[0] - losses[1]) < 1e-4 < abs(losses[1] - losses[2]) < 0.02 * losses[2]
    )
    grads = [[p.grad for p in model.parameters() if p.dim() > 1] for model in models]
    assert max(map(relative, grads[0], grads[1])) < 0.02  # an ulp in front of e4m3 is a step of it behind
    assert 0.01 < max(map(relative, grads[1], grads[2])) < 0.2
    with torch.no_grad():
        scores = [fn(x, y) for fn in (compiled, models[1].loss, models[2].loss)]
    assert scores[1] == scores[2] and abs(scores[0] - scores[2]) < 1e-5 and scores[2] == losses[2]


def test_the_artifact_does_not_know_it():
    h = tiny(**SIZES)
    assert h.fp8
    header, _ = t.open_artifact(
        t.pack_artifact({k: v.detach() for k, v in noisy_model(h).named_parameters()}, h)
    )
    assert "fp8" not in header["config"]


# ---------------------------------------------------------------- bound where it is right


@on_cpu
def test_what_is_wrong_is_not_bound(monkeypatch):
    """The log's name says by how much; what is wrong costs the MLP in bf16 nothing."""
    monkeypatch.setattr(t, "bind_attention", lambda h, device: t.Bound(t.attend_sdpa, "none"))
    bound = lambda **knobs: (lambda ops, names: (ops.mlp, names["mlp"]))(
        *t.bind_ops(tiny(**SIZES, **knobs), DEVICE)
    )
    line, name = bound()  # a CPU's interpreter is wrong in bf16
    assert line is t.mlp and re.fullmatch(r"torch \(error \S+\),fp8:torch\(error\S+\)", name), name
    emulate_fp8(monkeypatch)
    assert bound(fp8=0) == (t.FusedMLP.apply, "triton")
    fn, name = bound()
    assert name == "triton+fp8" and fn is not t.FusedMLP.apply
    right, quantise = t.mlp8_op, t.to_fp8

    def fails(name, wrong, why):
        with monkeypatch.context() as m:
            m.setattr(t, name, wrong)
            fn, told = bound()
            assert fn == t.FusedMLP.apply and re.fullmatch(rf"triton,fp8:torch\({why}\S*\)", told), told

    fails("mlp8_op", lambda *a: (right(*a)[0], 1.15 * right(*a)[1]), "error0.1")
    fails("mlp8_op", lambda *a: (1.15 * right(*a)[0], right(*a)[1]), "error1")  # the signs, too
    fails("mlp8_op", lambda *a: (right(*a)[0], torch.nan * right(*a)[1]), "errornan")
    fails("to_fp8", lambda x, step=None: quantise(x, None if step is None else step / 64), "error")
    fails("to_fp8", lambda x, step=None: (x, step), "TypeError")
    fails("mlp8_op", lambda *a: torch.zeros(3).view(7), "RuntimeError")


@on_cpu
def test_a_run_trains_in_it_and_is_scored_without(tmp_path, capfd, monkeypatch):
    """The log says so; the file's score is the one that a scorer without the knob gives."""
    emulate_fp8(monkeypatch, machine=True)
    texts = []
    for fp8 in (0, 1):
        args = english_args(**SIZES, iterations=8, fp8=fp8, out_dir=tmp_path / str(fp8))
        assert t.main(args) == 0
        texts.append((tmp_path / str(fp8) / "run.txt").read_text(encoding="utf-8"))
    told = [re.search(r"^machine .* mlp:(\S+) compile:none", text, re.M)[1] for text in texts]
    assert told == ["triton", "triton+fp8"] and "\n  fp8: True\n" in texts[1]
    losses = [[float(x) for x in re.findall(r"^step:\d+/8 train_loss:(\S+)", text, re.M)] for text in texts]
    assert len(losses[0]) == 8 and losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    find = lambda text: float(re.search(r"^final_int6_sliding_window_exact val_loss:(\S+)", text, re.M)[1])
    capfd.readouterr()
    data = [arg for arg in args if arg.startswith("data_path=")]
    assert (
        t.main(
            [
                "eval",
                str(tmp_path / "1" / "run.int6.xz"),
                *data,
                "eval_batch_tokens=512",
                f"out_dir={tmp_path}",
            ]
        )
        == 0
    )
    assert find(capfd.readouterr().out) == pytest.approx(find(texts[1]), rel=1e-6)


# ---------------------------------------------------------------- rows of a sweep


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """(sweep, its jobs by row and seed, an empty folder) of a tiny model with and without."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from lab import sweep

    raw = dict(name="fp8", multipliers=[1], rows={"bf16": {"fp8": False}, "fp8": {}})
    base = dict(arg.split("=", 1) for arg in english_args(**SIZES, iterations=4, warmup_steps=1))
    raw |= dict(base={k: v for k, v in base.items() if k not in ("run_id", "eval_stride")}, seeds=[1, 2])
    plan = sweep.make_plan(raw, "plan")
    for sub in ("logs", ".work"):
        (tmp_path / sub).mkdir()
    shutil.copyfile(sweep.SCRIPT, tmp_path / "train_gpt.py")
    yield (
        sweep,
        {(row, seed): plan.job(row, plan.rows[row].rates[0], seed) for row in plan.rows for seed in (1, 2)},
        tmp_path,
    )
    torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None


def request(job):
    line = dict(
        plan="fp8",
        row=job.row,
        baseline="bf16",
        key="matrix_lr",
        rate=job.rate,
        seed=job.seed,
        stage=job.stage,
    )
    return {"argv": job.argv, "line": line | dict(workers=1)}


@on_cpu
def test_rows_of_a_sweep_bind_and_compile_their_own(swept, monkeypatch):
    """Each row's log names what it bound; a seed binds nothing and compiles nothing; train trains the same."""
    emulate_fp8(monkeypatch, machine=True)
    from ledger import runlog, sweep_table

    def machine_of(bench, h):
        ops, names = t.bind_ops(h, bench.m.device)
        return dataclasses.replace(bench.m, ops=t.Ops(mlp=ops.mlp), names=bench.m.names | names)

    sweep, jobs, folder = swept
    monkeypatch.setattr(sweep.Bench, "machine", machine_of)  # as a GPU's binds
    bench, kept, graphs = sweep.Bench(t.load_config(list(jobs["bf16", 1].argv), {}), {}), [], []

    def compiler(f):
        def backend(graph, inputs):
            graphs.append(f.__name__)
            return graph.forward

        return (
            torch.compile(f, backend=backend, dynamic=False, fullgraph=True)
            if f.__name__ in ("loss", "nats")
            else f
        )

    bench.m = dataclasses.replace(bench.m, compile=compiler)
    counts = []
    for place in (("bf16", 1), ("fp8", 1), ("fp8", 2), ("bf16", 2)):
        bench.train(request(jobs[place]), folder)
        kept.append(bench.kept.loss_fn)
        counts.append(sorted(graphs))
        graphs.clear()
    assert kept[0] != kept[1] == kept[2] != kept[3]
    assert counts[0] == counts[1] == counts[3] and counts[0].count("loss") == 1 and counts[2] == []
    torch.distributed.destroy_process_group()
    score = lambda path: runlog.parse_log(path).text("final_score", "sha256")
    for (row, _), job in jobs.items():
        path = folder / "logs" / f"{job.name}.txt"
        told = re.search(r"^machine .* mlp:(\S+) ", path.read_text(encoding="utf-8"), re.M)[1]
        assert told == {"bf16": "triton", "fp8": "triton+fp8"}[row]
        assert t.main([*job.argv, f"out_dir={folder}/alone"]) == 0
        assert score(folder / "alone" / f"{job.name}.txt") == score(path)
    rows = {row["name"]: row for row in sweep_table.write_tables(folder)["rows"]}
    assert (rows["fp8"]["changes"], rows["fp8"]["own_init"]) == ({"fp8": "True"}, False)
    torch._dynamo.reset()


# ---------------------------------------------------------------- the device


@pytest.mark.gpu
def test_on_the_device():
    """Bound at the real size, and near bf16 there: output and gradients; the score's MLP is the one without."""
    ops, names = t.bind_ops(t.load_config([], {}), DEVICE)
    plain = t.bind_ops(t.load_config(["fp8=0"], {}), DEVICE)[0].mlp
    assert names["mlp"] == "triton+fp8" and plain == t.FusedMLP.apply
    inputs, results = draws(4, 2048, 512, 1536), []
    for fn in (ops.mlp, plain):
        leaves = [v.detach().clone().requires_grad_() for v in inputs]
        y = fn(*leaves)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE))
        results.append([y.detach(), *(v.grad for v in leaves)])
    errors = [*map(relative, *results)]
    assert 0.02 < errors[0] < 0.08 and max(errors[1:]) < 0.08, errors
    with torch.no_grad():
        assert torch.equal(ops.mlp(*inputs), plain(*inputs))
