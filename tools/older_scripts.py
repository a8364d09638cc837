"""What older scripts lack, bridged: records are audited and measured with their own scripts.

One function or table per gap, for the tools that load a train_gpt.py. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

# ---- names ---------------------------------------------------------------------------------------

# Names of older scripts: the present name -> the one that it had before.
RENAMED = {"capture_pass": "bind_pass", "LINGER_S": "LINGER", "ScoreSettings": "ScoreRun"}

# What a script does that is older than a knob or a property of its Config.
BEFORE_KNOBS = {
    "ttt_lr": 0.0,
    "ve_last_n": 0,
    "parallel_last_n": 0,
    "two_stream_layers": 0,
    "attn_gate_dims": 0,
    "skip_gates": False,
}


def rename_older_names(module: ModuleType) -> None:
    """Give what an older script defines the names that the trainer has for it now."""
    for name, older in RENAMED.items():
        if hasattr(module, older) and not hasattr(module, name):
            setattr(module, name, getattr(module, older))


def missing_names(module: ModuleType, needs: Iterable[str]) -> list[str]:
    """Return the entries of `needs` that the module lacks. CLASS.NAME is a method or dataclass field."""

    def has(name: str) -> bool:
        owner, _, member = name.partition(".")
        kind = getattr(module, owner, None)
        fields = getattr(kind, "__dataclass_fields__", {})
        return hasattr(module, owner) and (not member or hasattr(kind, member) or member in fields)

    return [name for name in needs if not has(name)]


def setting(h: Any, key: str) -> Any:
    """Return a knob or a property of a Config, which an older one may lack (BEFORE_KNOBS)."""
    return getattr(h, key, BEFORE_KNOBS[key])


# ---- errors and machine --------------------------------------------------------------------------


def known_fault(script: ModuleType, error: Exception) -> Exception | None:
    """Return the one line that a script has for an error, None if it has none.

    The scripts of the first records know only bad input.
    """
    of_script = getattr(script, "known_fault", None)
    if of_script is not None:
        return of_script(error)
    return error if isinstance(error, script.InputError) else None


def lost_another_rank(script: ModuleType, error: Exception) -> bool:
    """Return whether an error only says that another rank is gone. The first scripts cannot tell."""
    of_script = getattr(script, "lost_another_rank", None)
    return of_script is not None and of_script(error)


def linger_seconds(script: ModuleType) -> float:
    """Return how long a rank waits that lost another one. The first scripts do not wait."""
    return getattr(script, "LINGER_S", 0)


def guarded(script: ModuleType, run: Any) -> AbstractContextManager:
    """Return the context in which the script reports a failure; the first records' scripts have none."""
    guard = getattr(script, "guarded", None)
    return guard(run.m, run.log) if guard else nullcontext()


def machine_names(m: Any) -> dict[str, Any]:
    """Return the name of a script's device and what is bound there, by part, with the times that decided it.

    Older scripts keep all of it in `names`.
    """
    if hasattr(m, "names"):
        return m.names
    return {"device": m.device_name, **m.binding.parts, "times": m.bind_times}


def with_own_signals(m: Any) -> Any:
    """Return a Machine whose signals are new: a first one ends `train`; the audit leaves at once.

    The first scripts handle no signals, the next ones keep a list of them.
    """
    return dataclasses.replace(m, signals=type(m.signals)()) if hasattr(m, "signals") else m


def silence_status(log: Any) -> None:
    """Let a Log show no live line. Older scripts call on_terminal live."""
    log.on_terminal = False
    log.live = False


def wait_for_no_rank(script: ModuleType) -> None:
    """Let the ranks of a script meet nobody. Scripts that have no `meet` ask only init_process_group."""
    if hasattr(script, "meet"):
        script.meet = lambda ranks, env: {}


def phase_timer(subject: Any) -> Callable:
    """Return the method of a Run that times a phase. Older scripts call it timed."""
    return subject.time_phase if hasattr(subject, "time_phase") else subject.timed


# ---- the model -----------------------------------------------------------------------------------


def one_layer(h: Any) -> Any:
    """Return a script's Config with one layer, visited once, which has the parts that layers of `h` have."""
    counts = {key: min(1, setting(h, key)) for key in ("ve_last_n", "parallel_last_n")}
    smaller = dict(num_layers=1, xsa_last_n=1, loop_layers="", loop_times=0) | counts
    return dataclasses.replace(h, **{key: value for key, value in smaller.items() if hasattr(h, key)})


def is_matrix(script: ModuleType, spec: Any) -> bool:
    """Return whether a parameter multiplies each token.

    Older scripts list the names of those that do. Still older ones store these, and no others, as codes; the
    first ones say how a parameter is stored by its kind.
    """
    if hasattr(spec, "multiplies"):
        return spec.multiplies
    if hasattr(script, "MULTIPLIED"):
        return spec.name in script.MULTIPLIED
    encoding = spec.stored_as if hasattr(spec, "stored_as") else spec.kind
    return encoding.startswith("int")


def shape_of(table: dict, name: str) -> tuple[int, ...]:
    """Return the shape of a parameter in a script's parameter_table, whose rows were plain tuples once."""
    return table[name][0]


def is_serial(spec: Any) -> bool:
    """Return whether a layer adds attention before its MLP reads the sum. Older scripts have no other."""
    return not hasattr(spec, "form") or spec.form == "serial"


def run_layer(script: ModuleType, spec: Any, x: Any, x0: Any, w: Any, attention: Callable, ops: Any) -> Any:
    """Return the residual streams after a layer, given the attention (x, w) -> (B, T, D) in it.

    Older scripts have one form of layer, no function for it, and one stream, which is returned as it is.
    """
    if hasattr(script, "FORMS"):
        feed_forward = partial(script.feed_forward, w=w, ops=ops)
        return script.FORMS[spec.form]((x,), x0, w, partial(attention, w=w), feed_forward)
    x = script.residual_mix(x, x0, w.resid_mix)
    x = x + attention(script.rms_norm(x), w)
    return x + ops.mlp(script.rms_norm(x), w.up, w.down)


def is_reference_qk(script: ModuleType, qk: Callable) -> bool:
    """Return whether `qk` is the script's reference of QK norm, rope and gain; older scripts have none."""
    return qk is getattr(script, "qk_heads", None)


# ---- a step --------------------------------------------------------------------------------------


class MicroBatches(NamedTuple):
    """The micro-batches of a step on one rank."""

    accum: int
    sequences: int  # of each


def micro_batches_of(script: ModuleType, h: Any, world_size: int) -> MicroBatches:
    """Cut the batch of a step as the script does. Older scripts return a plain tuple."""
    accum, sequences, *_ = script.cut_batch(h, world_size)
    return MicroBatches(accum, sequences)


class Pass(NamedTuple):
    """Forward and backward of a micro-batch.

    backward: (sequences (B, T + 1), micro-batches of the step) -> their part of the loss, (). failure: why
    capture failed; None, "" of older scripts, for a CUDA graph, and on a device without graphs.
    """

    backward: Callable[..., Any]
    failure: str | None


def capture_pass(script: ModuleType, loss_fn: Callable, optimizer: Any) -> Pass:
    """Capture a pass as the script does. Older passes count the micro-batches themselves."""
    backward, failure = script.capture_pass(loss_fn, optimizer)
    if len(inspect.signature(backward).parameters) == 2:
        return Pass(backward, failure)

    def backward_with_count(sequences: Any, count: int | None = None) -> Any:
        return backward(sequences)

    return Pass(backward_with_count, failure)


# ---- the optimizer -------------------------------------------------------------------------------

# What the StepScalars of older scripts hold besides, of no effect: later ones pass the factor of the gradient
# as an argument, and have a decay each for matrices and all others.
OLDER_SCALARS = {"gradient_factor": 1.0, "clip": 1.0, "decay_mul": 1.0}


def state_shape_of(script: ModuleType, rule: str) -> Callable | None:
    """Return the function from (S, M, N) to the shape of a step rule's state, or None if it has no state.

    Older scripts list the shapes in RULE_STATE, apart from the rules, and the first ones have none.
    """
    row = script.STEP_RULES[rule]
    if hasattr(row, "state_shape"):
        return row.state_shape
    return getattr(script, "RULE_STATE", {}).get(rule)


def matrices_of_update(script: ModuleType, inputs: dict[str, Any], state: Any) -> dict[str, Any]:
    """Return the arguments of a script's matrix_update that hold matrices, by name.

    inputs: W, g and momentum, which older scripts take one by one, and the state as `second`.
    """
    if "matrices" in inspect.signature(script.matrix_update).parameters:
        return {"matrices": script.OwnedMatrices(inputs["W"], inputs["g"], inputs["momentum"], state)}
    return {**inputs, "second": state}


# ---- checkpoints and artifacts -------------------------------------------------------------------


def saved_parts(state: Any) -> list[tuple[dict, dict]]:
    """Return header and tensors of each rank's part of a checkpoint, which were plain tuples once."""
    return [(header, tensors) for header, tensors in state.parts]


CODEC_NEEDS = ("CODECS", "codec_of")  # a script has them if its artifacts name their compressor


def compressor(script: ModuleType, blob: bytes) -> Callable[[bytes], bytes]:
    """Return what compressed the artifact `blob`: the script's codec, or xz for one that knows no other."""
    if missing_names(script, CODEC_NEEDS):
        import lzma  # here, because run.sh prints its help even with a Python that was built without it

        return partial(lzma.compress, **script.XZ)
    return script.CODECS[script.codec_of(blob)].pack


# ---- scoring and test-time training --------------------------------------------------------------

SCORING_NEEDS = ("Run.scoring",)  # a script has it if it gives its learners windows
METRIC_NEEDS = ("metrics_of",)  # a script has it if it says by which metrics it scores
WINDOW_NEEDS = ("Windows",)  # a script has it if its windows are three arrays, not rows of three numbers


def can_learn(script: ModuleType) -> bool:
    """Return whether the script has test-time training."""
    return not missing_names(script, ("Config.ttt_lr",))


def chunk_of(h: Any) -> int:
    """Return the targets that are scored before they are learned from; 0: nothing is learned."""
    return h.ttt_chunk_tokens if setting(h, "ttt_lr") else 0


def gives_windows(script: ModuleType) -> bool:
    """Return whether the script gives its learners windows; older ones give a chunk's tokens."""
    return not missing_names(script, SCORING_NEEDS)


def counted_stride(script: ModuleType, h: Any) -> int:
    """Return the stride of the score that counts; scripts without metrics_of slide by eval_stride."""
    return h.eval_stride if missing_names(script, METRIC_NEEDS) else script.metrics_of(h)[-1].stride


def learns_apart(script: ModuleType, scoring: Any) -> bool:
    """Return whether a ScoreSettings scores every document apart, and forgets what it learned after each.

    Older scripts name a layout, and the first ones have none: with windows one after the other, their bos_id
    is -1 or missing.
    """
    if hasattr(scoring, "groups"):
        return scoring.groups is script.document_groups
    if hasattr(scoring, "layout"):
        return scoring.layout == "documents"
    return getattr(scoring, "bos_id", -1) >= 0


def plan_older_scores(script: ModuleType, run: Any, chunk: int, log: Any) -> Any:
    """Return the ScoreSettings of the final score of a script that has no Run.scoring to make it."""
    h = run.h
    batch = h.eval_batch_tokens // h.eval_seq_len
    scoring = script.ScoreSettings(h.eval_seq_len, h.eval_stride, batch, "audit", log)
    if chunk:
        learner = partial(script.learning, run.model, run.loss_fn, h, run.m)
        scoring = scoring._replace(chunk=chunk, learner=learner)
    return scoring


def takes_rows(script: ModuleType) -> bool:
    """Return whether the script's learners take windows as rows of start, end and the first target scored."""
    return bool(missing_names(script, WINDOW_NEEDS))


def targets_of(tokens: Any, lesson: Any) -> Any:
    """Return the targets that a learner is given: those of windows, or of an older script's tokens."""
    if isinstance(lesson, float):
        return tokens[1:]
    windows = zip(*lesson) if isinstance(lesson, tuple) else lesson.tolist()
    return tokens[[target for _, end, first in windows for target in range(first + 1, end + 1)]]


def passes_of(script: ModuleType, run: Any, model: Any) -> dict[str, Callable]:
    """Return the fields of a Run that hold the passes of a model without a loop, by name.

    Both passes of training are the same there. Scripts from before the loop have only one. Older scripts
    score with a plain function.
    """
    training = {name: model.loss for name in ("loss_fn", "plain_loss_fn") if hasattr(run, name)}
    as_scoring_pass = getattr(script, "ScoringPass", lambda nats: nats)
    return training | {"nats_fn": as_scoring_pass(model.nats)}
