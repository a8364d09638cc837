"""The MLP's forward in e4m3: the operator, compiled models, binding only what is right, runs and sweeps."""

import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from lab.training import planning
from lab.training.worker import Worker
from ledger.make import sweep_table
from ledger.read import runlog
from script import TRAINER
from tests.helpers import english_args, gaussian, noisy_model, random_tokens, tiny
from tests.trainer.fp8_cases import emulate_fp8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter multiplies bf16 wrongly.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
on_cpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="tests the CPU's own or emulated path")
SIZES = dict(num_layers=1, xsa_last_n=1, ve_last_n=1, model_dim=64, num_heads=2, num_kv_heads=1, mlp_mult=3.0)


def by_dtype(float32, bfloat16):
    """Return the tolerance for the type that the tests run in."""
    return float32 if DTYPE == torch.float32 else bfloat16


def relative(a, b):
    """Return the norm of a - b over the norm of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


class Operands(NamedTuple):
    """The operands of an MLP."""

    x: torch.Tensor  # (B, T, D), normalised
    up: torch.Tensor  # (F, D)
    down: torch.Tensor  # (D, F)


def draw_operands(B, T, D, hidden):
    """Return random Operands, the same for the same T."""
    generator = torch.Generator().manual_seed(T)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, DTYPE)

    return Operands(t.rms_norm(draw(B, T, D)), draw(hidden, D) / D**0.5, draw(D, hidden) / hidden**0.5)


def output_gradient(y):
    """Return a fixed random gradient of an output."""
    return gaussian(*y.shape, seed=1).to(DEVICE, DTYPE)


@pytest.fixture(autouse=True)
def interpreter_rounds(monkeypatch):
    """Let PyTorch round to e4m3 in Triton's interpreter.

    The interpreter loses the carry of a mantissa that it rounds up to the next power of two. A value that is
    too large becomes NaN, as e4m3 defines it and PyTorch 2.11 gives it.
    """
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
    """h is the float64 product of the copies of x and up; y is that of the copies of h and down."""
    x, up, down = draw_operands(*size)
    x = x[0]
    up[5] = 100 * up[5]  # h of this row saturates
    x8, x_step = t.to_fp8(x, 0.125)
    up8, up_step = t.to_fp8(up)
    down8, down_step = t.to_fp8(down)
    assert x_step == 0.125
    assert up8.float().abs().max() == down8.float().abs().max() == 448

    h_step = torch.tensor(0.5, device=DEVICE)
    operands = (x8, up8, down8, [0.125 * up_step, h_step, down_step], DTYPE)
    h, y = t.mlp8_op(*operands)
    assert h.dtype == y.dtype == DTYPE
    u = x8.double() @ up8.double().T * (0.125 * up_step.double())
    # Measured: 8.8e-8 in float32.
    assert relative(h, F.leaky_relu(u, 0.5).square()) < by_dtype(float32=1e-6, bfloat16=4e-3)
    h8 = (h.float() / h_step).clamp(max=448).to(torch.float8_e4m3fn).double()
    assert (h8 == 448).any()
    exact = h8 @ down8.double().T * (h_step.double() * down_step.double())
    assert relative(y, exact) < by_dtype(float32=1e-6, bfloat16=5e-3)  # measured: 3.5e-7 in float32
    checks = ("test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(t.mlp8_op, operands, test_utils=checks)


def test_copies_of_zeros_are_zeros_and_large_values_saturate():
    zeros, step = t.to_fp8(torch.zeros(16, 32))
    assert not zeros.float().any() and step > 0
    large, _ = t.to_fp8(torch.tensor([1e9, -1e9]), 0.125)
    assert large.tolist() == [448, -448]  # not NaN


def test_its_backward_is_that_of_the_mlp_without_fp8():
    """It takes the h that forward kept, and input and matrices before they were rounded to e4m3."""
    leaves = [operand.clone().requires_grad_() for operand in draw_operands(2, 40, 64, 192)]
    y = t.FusedMLP8.apply(*leaves)
    dy = output_gradient(y)
    y.backward(dy)

    x, up, down = (leaf.detach().double() for leaf in leaves)
    x8, _ = t.to_fp8(leaves[0].detach(), 0.125)
    up8, up_step = t.to_fp8(leaves[1].detach())
    u = x8.double() @ up8.double().T * (0.125 * up_step.double())
    h = F.leaky_relu(u, 0.5).square()
    du = dy.double() @ down * torch.where(u > 0, 2 * u, 0.5 * u)
    exact = [
        du @ up,
        du.flatten(0, 1).T @ x.flatten(0, 1),
        dy.double().flatten(0, 1).T @ h.flatten(0, 1),
    ]
    for leaf, gradient in zip(leaves, exact):
        # Measured: 2.9e-7 in float32.
        assert relative(leaf.grad, gradient) < by_dtype(float32=1e-5, bfloat16=0.01)


def test_steps_follow_the_matrices():
    """The error is e4m3's at any size of either matrix, and a matrix of zeros gives zeros."""
    x, up, down = draw_operands(2, 64, 64, 192)
    errors = []
    for up_scale, down_scale in ((1, 1), (0.02, 1), (50, 1), (1, 0.02), (1, 50)):
        operands = (x, up_scale * up, down_scale * down)
        errors.append(relative(t.FusedMLP8.apply(*operands), t.mlp(*operands)))
    # Measured: 0.06.
    assert 0.02 < min(errors) and max(errors) < 0.07 and max(errors) < 1.2 * min(errors), errors
    assert not t.FusedMLP8.apply(x, 0 * up, down).any()
    assert not t.FusedMLP8.apply(x, up, 0 * down).any()


# ---------------------------------------------------------------- in a model


def bind_untested(fast, reference, inputs, name="triton", limit=0.01):
    """Bind the fast function without comparing it."""
    return t.Bound(fast, name)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_compiled_model_trains_in_it_and_scores_without(backend, monkeypatch):
    """One graph gives the eager model's loss and gradients. Without gradients the MLP runs without fp8."""
    monkeypatch.setattr(t, "bind", bind_untested)
    h = tiny(**SIZES | dict(num_layers=2), fp8=1)
    bound = t.bind_mlp(h, DEVICE)
    assert bound.label == "triton+fp8"

    models = [noisy_model(h).to(DEVICE) for _ in range(3)]
    for model, function in zip(models, (bound.function, bound.function, t.FusedMLP.apply)):
        model.ops = t.Ops(mlp=function)
        model.dtype = DTYPE
    to_compile, eager, plain = models
    compiled = torch.compile(to_compile.loss, dynamic=False, fullgraph=True, backend=backend)
    functions = (compiled, eager.loss, plain.loss)
    x, y = random_tokens(h, (2, 2, 16)).to(DEVICE)
    losses = [function(x, y) for function in functions]
    for loss in losses:
        loss.backward()
    # Measured: 4.8e-7, and 0.0013 of the loss.
    assert abs(losses[0] - losses[1]) < 1e-4 < abs(losses[1] - losses[2]) < 0.02 * losses[2]

    grads = [[p.grad for p in model.parameters() if p.dim() > 1] for model in models]
    # An ulp before e4m3 may be one of its steps after it; measured: 1.7e-6.
    assert max(map(relative, grads[0], grads[1])) < 0.02
    assert 0.01 < max(map(relative, grads[1], grads[2])) < 0.2  # measured: 0.067

    with torch.no_grad():
        scores = [function(x, y) for function in functions]
    assert scores[1] == scores[2]
    assert abs(scores[0] - scores[2]) < 1e-5  # measured: 0
    assert scores[2] == losses[2]


def test_the_artifact_does_not_know_it():
    h = tiny(**SIZES)
    assert h.fp8
    tensors = {name: p.detach() for name, p in noisy_model(h).named_parameters()}
    header, _ = t.open_artifact(t.pack_artifact(tensors, h))
    assert "fp8" not in header["config"]


# ---------------------------------------------------------------- bound where it is right


def bound_mlp(**knobs):
    """Return the MLP that the machine binds, and its label."""
    bound = t.bind_mlp(tiny(**SIZES, **knobs), DEVICE)
    return bound.function, bound.label


@on_cpu
def test_a_wrong_mlp_is_not_bound(monkeypatch):
    """The label in the log gives the error. If only fp8 is wrong, the MLP in bf16 is still bound."""
    function, label = bound_mlp()  # a CPU's interpreter is wrong in bf16
    assert function is t.mlp
    assert re.fullmatch(r"torch\(triton:error_[^\s,]+,fp8:error_[^\s,]+\)", label), label

    emulate_fp8(monkeypatch)
    assert bound_mlp(fp8=0) == (t.FusedMLP.apply, "triton")
    function, label = bound_mlp()
    assert label == "triton+fp8" and function is not t.FusedMLP.apply

    mlp8_op = t.mlp8_op
    to_fp8 = t.to_fp8

    def wrong_output(*args):
        h, y = mlp8_op(*args)
        return h, 1.15 * y

    def wrong_hidden(*args):  # its last bits, which hold the signs, are wrong, too
        h, y = mlp8_op(*args)
        return 1.15 * h, y

    def nan_output(*args):
        h, y = mlp8_op(*args)
        return h, torch.nan * y

    def small_step(x, step=None):
        return to_fp8(x, None if step is None else step / 64)

    def no_copy(x, step=None):
        return x, step

    def failing(*args):
        return torch.zeros(3).view(7)

    for name, wrong, reason in (
        ("mlp8_op", wrong_output, "error_0.1"),
        ("mlp8_op", wrong_hidden, "error_1"),
        ("mlp8_op", nan_output, "error_nan"),
        ("to_fp8", small_step, "error_"),
        ("to_fp8", no_copy, "TypeError"),
        ("mlp8_op", failing, "RuntimeError"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(t, name, wrong)
            function, label = bound_mlp()
        assert function == t.FusedMLP.apply
        assert re.fullmatch(rf"triton\(fp8:{reason}\S*\)", label), label


def mlp_label(log):
    """Return the label of the MLP in a log."""
    return re.search(r"^machine .* mlp:(\S+) compile:none", log, re.M)[1]


def sliding_loss(log):
    """Return the loss of the sliding score in a log."""
    return float(re.search(r"^final_int6_sliding_window_exact val_loss:(\S+)", log, re.M)[1])


@on_cpu
def test_a_run_trains_in_it_and_is_scored_without(tmp_path, capfd, monkeypatch):
    """The log says so, and `eval`, which does not know the knob, gives the artifact the same score."""
    emulate_fp8(monkeypatch, machine=True)
    logs = []
    for fp8 in (0, 1):
        folder = tmp_path / str(fp8)
        assert t.main(english_args(**SIZES, iterations=8, fp8=fp8, out_dir=folder)) == 0
        logs.append((folder / "run.txt").read_text(encoding="utf-8"))
    assert [mlp_label(log) for log in logs] == ["triton", "triton+fp8"]
    assert "\n  fp8: True\n" in logs[1]

    losses = []
    for log in logs:
        losses.append([float(loss) for loss in re.findall(r"^step:\d+/8 train_loss:(\S+)", log, re.M)])
    assert len(losses[0]) == 8
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # measured: 5.1e-4

    data = [argument for argument in english_args() if argument.startswith("data_path=")]
    artifact = str(tmp_path / "1" / "run.int6.xz")
    capfd.readouterr()
    assert t.main(["eval", artifact, *data, "eval_batch_tokens=512", f"out_dir={tmp_path}"]) == 0
    evaluated = capfd.readouterr().out
    log = re.search(r"^log: (.*)$", evaluated, re.M)[1]
    again = sliding_loss(Path(log).read_text(encoding="utf-8"))
    assert again == pytest.approx(sliding_loss(logs[1]), rel=1e-6)  # measured: 0


# ---------------------------------------------------------------- rows of a sweep


@pytest.fixture
def sweep(tmp_path):
    """Return an empty sweep folder and its configurations by row and seed: a tiny model in bf16 and fp8."""
    knobs = dict(argument.split("=", 1) for argument in english_args(**SIZES, iterations=4, warmup_steps=1))
    base = {key: value for key, value in knobs.items() if key not in ("run_id", "eval_stride")}
    raw = {
        "name": "fp8",
        "base": base,
        "multipliers": [1],
        "rows": {"bf16": {"fp8": False}, "fp8": {}},
        "seeds": [1, 2],
    }
    plan = planning.make_plan(t, raw, "plan")
    configurations = {}
    for name, row in plan.rows.items():
        for seed in plan.seeds:
            configurations[name, seed] = plan.configuration(name, row.rates[0], seed)

    for part in ("logs", ".work"):
        (tmp_path / part).mkdir()
    shutil.copyfile(TRAINER, tmp_path / "train_gpt.py")
    yield SimpleNamespace(folder=tmp_path, configurations=configurations)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def request(configuration):
    """Return the request with which a sweep has a worker train a configuration."""
    line = dict(
        plan="fp8",
        row=configuration.row,
        baseline="bf16",
        key="matrix_lr",
        rate=configuration.rate,
        seed=configuration.seed,
        stage=configuration.stage,
        workers=1,
    )
    return {"argv": configuration.argv, "line": line}


def machine_like_a_gpus(worker, h):
    """Bind the MLP for a config's model, as Worker.machine_for does on a GPU."""
    bound = t.bind_mlp(h, worker.m.device)
    binding = worker.m.binding._replace(mlp=bound.label)
    return dataclasses.replace(worker.m, ops=t.Ops(mlp=bound.function), binding=binding)


def artifact_sha256(path):
    """Return the artifact's hash in the log of a run."""
    return runlog.parse_log(path).text("final_score", "sha256")


@pytest.mark.long
@on_cpu
def test_rows_of_a_sweep_bind_and_compile_their_own(sweep, monkeypatch):
    """Each row binds and compiles its own MLP, and a new seed neither; train trains the same."""
    emulate_fp8(monkeypatch, machine=True)
    monkeypatch.setattr(Worker, "machine_for", machine_like_a_gpus)
    argv = list(sweep.configurations["bf16", 1].argv)
    worker = Worker(t, t.load_config(argv, {}), {})
    graphs = []

    def compile_and_note(function):
        def backend(graph, inputs):
            graphs.append(function.__name__)
            return graph.forward

        if function.__name__ not in ("loss", "nats"):
            return function
        return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)

    worker.m = dataclasses.replace(worker.m, compile=compile_and_note)
    loss_fns = []
    compiled = []
    for row, seed in (("bf16", 1), ("fp8", 1), ("fp8", 2), ("bf16", 2)):
        worker.train(request(sweep.configurations[row, seed]), sweep.folder)
        loss_fns.append(worker.kept.loss_fn)
        compiled.append(sorted(graphs))
        graphs.clear()
    assert loss_fns[0] != loss_fns[1] == loss_fns[2] != loss_fns[3]
    assert compiled[0] == compiled[1] == compiled[3]
    assert compiled[0].count("loss") == 1
    assert compiled[2] == []
    torch.distributed.destroy_process_group()

    alone = sweep.folder / "alone"
    for (row, _), configuration in sweep.configurations.items():
        path = sweep.folder / "logs" / f"{configuration.name}.txt"
        expected = {"bf16": "triton", "fp8": "triton+fp8"}[row]
        assert mlp_label(path.read_text(encoding="utf-8")) == expected
        assert t.main([*configuration.argv, f"out_dir={alone}"]) == 0
        assert artifact_sha256(alone / f"{configuration.name}.txt") == artifact_sha256(path)

    rows = {row["name"]: row for row in sweep_table.write_tables(sweep.folder)["rows"]}
    assert (rows["fp8"]["changes"], rows["fp8"]["own_init"]) == ({"fp8": "True"}, False)
    torch._dynamo.reset()


# ---------------------------------------------------------------- the device


@pytest.mark.gpu
def test_on_the_device():
    """It is bound at the real size. Output and gradients are close to bf16's, and a score is bf16's."""
    bound = t.bind_mlp(t.load_config([], {}), DEVICE)
    plain = t.bind_mlp(t.load_config(["fp8=0"], {}), DEVICE)
    assert bound.label == "triton+fp8" and plain.function == t.FusedMLP.apply

    operands = draw_operands(4, 2048, 512, 1536)
    results = []
    for function in (bound.function, plain.function):
        leaves = [operand.detach().clone().requires_grad_() for operand in operands]
        y = function(*leaves)
        y.backward(output_gradient(y))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    errors = [*map(relative, *results)]
    assert 0.02 < errors[0] < 0.08 and max(errors[1:]) < 0.08, errors
    with torch.no_grad():
        assert torch.equal(bound.function(*operands), plain.function(*operands))
