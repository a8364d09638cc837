"""Compares replacements of the model's functions with the script as it is: errors first, then times.

A candidates file defines CANDIDATES = {name: (path, function)}, or a list of such pairs for a name. `t` in it
is a copy of the script. Plain means without the candidate: the model and the sections as the script has them.
Errors are relative to float64.
"""

from __future__ import annotations

import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lab.model.sections import (
    OUTPUT_LAYER,
    Section,
    SectionTime,
    as_list,
    leaves_of,
    sections_of,
    time_section,
)
from lab.shared.exact import attend_exact, relative
from lab.shared.timing import typical, wall_ms
from lab.shared.trainer import (
    MODULE,
    Session,
    TrainingParts,
    copy_weights,
    fill_weights,
    load_trainer,
    zero_model,
)
from ledger.files import as_json
from script import BadInput

PAIRS = 10  # timed pairs of plain and candidate, after WARM_PAIRS
WARM_PAIRS = 2
ERROR_SLACK = 1.5  # a candidate's error may be this many times the plain one
NUMBER_MARGIN = 1e-3  # and this much more, for an error of one number: chance leaves any
TENSOR_MARGIN = 1e-5  # or of a tensor
FEW = 64  # a gradient of fewer numbers, whose signs may cancel,
CHANCE = 0.1  # is forgiven this relative error
GAIN = 0.998  # a candidate is faster if it takes less than this fraction of the plain time
WINS = 0.8  # a winner is faster in at least this fraction of the pairs


# ---- the file ------------------------------------------------------------------------------------


class Replacement(NamedTuple):
    """A function to put in the place of one of the script's."""

    path: str  # its name in the script, such as mlp or GPT.nats
    function: Callable  # of the same signature


def read_candidates(path: Path, t: ModuleType) -> dict[str, list[Replacement]]:
    """Run a candidates file with `t` in its scope. Raises BadInput if it does not run or defines none."""
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot read the candidates ({error.strerror})") from None

    name = f"{t.__name__}_candidates"  # a module, because torch.compile looks names up there
    module = ModuleType(name)
    sys.modules[name] = module
    module.__dict__.update(t=t, __file__=str(path))
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        raise BadInput(f"{path}: does not run ({type(error).__name__}: {error}); fix it") from None

    given = getattr(module, "CANDIDATES", None)
    if not isinstance(given, dict) or not given:
        raise BadInput(f"{path}: defines no CANDIDATES = {{name: (path, function)}}")
    return {str(key): replacements_of(value) for key, value in given.items()}


def replacements_of(value: Any) -> list[Replacement]:
    """Return the replacements of a candidate: one pair or a list of pairs."""
    pairs = value if isinstance(value, list) else [value]
    return [Replacement(*pair) for pair in pairs]


def chosen_names(path: Path, only: str | None, t: ModuleType) -> list[str]:
    """Return the candidates to compare, before anything is measured. only: their names, comma separated."""
    names = list(read_candidates(path, t))
    if not only:
        return names
    asked = only.split(",")
    for name in asked:
        if name not in names:
            raise BadInput(f"--only {name}: not in {path}, which has {', '.join(names)}")
    return asked


class Installed(NamedTuple):
    """What a candidate replaced. ops: the machine's, with the candidate's functions in them."""

    ops: Any
    paths: set[str]


def install(t: ModuleType, ops: Any, replacements: list[Replacement]) -> Installed:
    """Put the functions into the copy `t` and into `ops`."""
    paths = set()
    for given, function in replacements:
        path = given.removeprefix("t.")
        *owners, last = path.split(".")
        owner = t
        for name in owners:
            owner = getattr(owner, name)
        before = getattr(owner, last)
        setattr(owner, last, function)

        for field, default in t.Ops._field_defaults.items():
            if default is before:  # the machine may have bound another function in its place
                ops = ops._replace(**{field: function})
        paths.add(path)
    return Installed(ops, paths)


# ---- errors --------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """Loss and gradients in float64."""

    loss: Tensor
    gradients: dict[str, Tensor]


class ModelErrors(NamedTuple):
    """Relative errors of a forward+backward: the loss, all gradients together, the worst parameter's."""

    loss: float
    gradients: float
    worst: float
    worst_parameter: str

    def __str__(self) -> str:
        return (
            f"error of loss {self.loss:.1e}, of gradients {self.gradients:.1e}, "
            f"worst {self.worst:.1e} ({self.worst_parameter})"
        )


class SectionErrors(NamedTuple):
    """The largest relative errors of a section's outputs, and of its gradients."""

    forward: float
    gradients: float


def nan_is_largest(error: float) -> float:
    """Order errors so that nan is the largest."""
    return math.inf if math.isnan(error) else error


def gradient_error(grad: Tensor | None, exact: Tensor) -> float:
    """Return a gradient's relative error, less CHANCE where it has few numbers. None: there is none."""
    error = 1.0 if grad is None else relative(grad, exact)
    if exact.numel() < FEW and error >= 0:  # not nan
        return max(error - CHANCE, 0.0)
    return error


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Copy the gradients of all parameters that need them; zeros for one that has none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def reference_of(s: Session, run: TrainingParts, tokens: Tensor) -> Reference:
    """Compute the plain model's loss and gradients in float64, one sequence at a time. tokens: (B, T + 1)."""
    model = zero_model(s, s.t, s.h, s.t.Ops(attend=attend_exact), torch.float64).double()
    copy_weights(model, run.model)
    total = torch.zeros((), dtype=torch.float64, device=s.m.device)
    for one in tokens.split(1):
        loss = model.loss(one[:, :-1], one[:, 1:]) / len(tokens)
        loss.backward()
        total += loss.detach()
    return Reference(total, gradients_of(model))


def model_errors(model: Any, loss_fn: Callable, tokens: Tensor, exact: Reference) -> ModelErrors:
    """Return the errors of one forward+backward."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    loss = loss_fn(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss.backward()

    def flat(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].double().flatten() for name in exact.gradients])

    found = gradients_of(model)
    errors = {name: gradient_error(grad, exact.gradients[name]) for name, grad in found.items()}
    worst = max(errors, key=lambda name: nan_is_largest(errors[name]))
    return ModelErrors(
        loss=relative(loss.detach(), exact.loss),
        gradients=relative(flat(found), flat(exact.gradients)),
        worst=errors[worst],
        worst_parameter=worst,
    )


def section_named(s: Session, t: ModuleType, ops: Any, dtype: torch.dtype, name: str) -> Section:
    """Make one section of the script."""
    return next(section for section in sections_of(s, t, ops, dtype) if section.name == name)


def section_errors(s: Session, t: ModuleType, ops: Any, name: str) -> SectionErrors:
    """Return the errors of a section's outputs and gradients on one sequence, uncompiled, against float64."""
    one = s._replace(sequences=1)
    section = section_named(one, t, ops, s.m.dtype, name)
    exact_section = section_named(one, s.t, s.t.Ops(attend=attend_exact), torch.float64, name)
    torch.manual_seed(0)  # every candidate meets the numbers that the plain section met

    args = section.inputs()
    exact_args = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in args
    ]
    outs = as_list(section.fn(*args))
    exact_outs = as_list(exact_section.fn(*exact_args))

    output_gradients = [torch.randn_like(x) for x in outs]
    same = [grad.to(x.dtype) for grad, x in zip(output_gradients, exact_outs)]
    leaves = leaves_of(section, args)
    exact_leaves = leaves_of(exact_section, exact_args)
    grads = torch.autograd.grad(outs, leaves, output_gradients, allow_unused=True)
    exact_grads = torch.autograd.grad(exact_outs, exact_leaves, same, allow_unused=True)

    forward = [relative(x, y) for x, y in zip(outs, exact_outs)]
    gradients = [gradient_error(x, y) for x, y in zip(grads, exact_grads) if y is not None]
    return SectionErrors(max(forward, key=nan_is_largest), max(gradients, key=nan_is_largest))


# ---- times and verdict ---------------------------------------------------------------------------


class Pair(NamedTuple):
    """ms of forward+backward, one right after the other."""

    plain: float
    other: float


def time_pairs(s: Session, plain: TrainingParts, other: TrainingParts) -> list[Pair]:
    """Time forward+backward in pairs, the order alternating: a drift of the clocks meets both."""
    pairs = []
    for i in range(WARM_PAIRS + PAIRS):
        if i % 2:
            plain_ms = wall_ms(s, plain.both)
            other_ms = wall_ms(s, other.both)
        else:
            other_ms = wall_ms(s, other.both)
            plain_ms = wall_ms(s, plain.both)
        pairs.append(Pair(plain_ms, other_ms))
    return pairs[WARM_PAIRS:]


class SectionRow(NamedTuple):
    """A section with a candidate beside the plain one. ms of one call."""

    section: str
    plain_forward_ms: float
    plain_backward_ms: float
    forward_ms: float
    backward_ms: float
    plain_errors: SectionErrors
    errors: SectionErrors

    def __str__(self) -> str:
        plain = self.plain_errors
        return (
            f"  {self.section}: forward {self.forward_ms:.4f} ms, plain {self.plain_forward_ms:.4f}; "
            f"backward {self.backward_ms:.4f}, plain {self.plain_backward_ms:.4f}; errors "
            f"{self.errors.forward:.1e} {self.errors.gradients:.1e}, plain "
            f"{plain.forward:.1e} {plain.gradients:.1e}"
        )


class CandidateRow(NamedTuple):
    """The whole model with a candidate beside the plain one, and the sections that use the candidate.

    ms of forward+backward; wins: in how many pairs the candidate is faster.
    """

    name: str
    paths: list[str]
    plain: ModelErrors
    errors: ModelErrors
    plain_ms: float
    ms: float
    wins: int
    pairs: int
    sections: list[SectionRow]

    def __str__(self) -> str:
        return (
            f"candidate {self.name} ({', '.join(self.paths)}): forward+backward {self.ms:.3f} ms, plain "
            f"{self.plain_ms:.3f}; {self.errors}"
        )


class Compared(NamedTuple):
    """One figure of the verdict. one_number: it is the error of a single number, not of a tensor."""

    what: str
    error: float
    plain: float
    one_number: bool

    @property
    def too_large(self) -> bool:
        margin = NUMBER_MARGIN if self.one_number else TENSOR_MARGIN
        return not self.error <= ERROR_SLACK * self.plain + margin  # nan is too large


def compared_errors(row: CandidateRow) -> Iterator[Compared]:
    """Yield the errors of a candidate beside the plain ones: the model's, then each section's."""
    yield Compared("loss error", row.errors.loss, row.plain.loss, one_number=True)
    yield Compared("gradients error", row.errors.gradients, row.plain.gradients, one_number=False)
    yield Compared("worst error", row.errors.worst, row.plain.worst, one_number=False)
    for section in row.sections:
        plain = section.plain_errors._asdict()
        for key, error in section.errors._asdict().items():
            one_number = section.section == OUTPUT_LAYER and key == "forward"
            yield Compared(f"{section.section}, {key} error", error, plain[key], one_number)


def verdict(row: CandidateRow) -> str:
    """Say keep, or drop and why: a suggestion from one run on one machine."""
    for figure in compared_errors(row):
        if figure.too_large:
            return f"drop ({figure.what} {figure.error:.1e}, plain {figure.plain:.1e})"

    fraction = row.ms / row.plain_ms
    wins = f"faster in {row.wins} of {row.pairs} pairs"
    if fraction < GAIN and row.wins >= WINS * row.pairs:
        return f"keep ({100 * (1 - fraction):.1f} % faster, {wins})"
    return f"drop (takes {100 * fraction:.1f} % of the time, {wins})"


def row_json(row: CandidateRow) -> dict[str, Any]:
    """Return a candidate's row and verdict as the JSON report has them."""
    return as_json(row) | dict(verdict=verdict(row))


# ---- comparing -----------------------------------------------------------------------------------


class PlainSection(NamedTuple):
    """A section's figures without any candidate."""

    times: SectionTime
    errors: SectionErrors


class Comparison:
    """Compares candidates with one plain model; prints each line when it is known.

    Construction fills the model's weights and computes the reference and the plain errors.
    """

    def __init__(self, s: Session, run: TrainingParts, path: Path) -> None:
        self.s = s
        self.run = run
        self.path = path
        self.tokens = run.batches[0]
        self.known: dict[str, PlainSection] = {}
        with torch.no_grad():
            fill_weights(s.t, run.model)
        self.exact = reference_of(s, run, self.tokens)
        self.plain_errors = model_errors(run.model, run.loss_fn, self.tokens, self.exact)

    def judge(self, name: str) -> CandidateRow:
        """Return the row of one candidate. Raises whatever its functions raise."""
        s = self.s
        suffix = re.sub(r"[^A-Za-z0-9]", "_", name)
        t = load_trainer(Path(s.t.__file__), f"{MODULE}_{suffix}")
        ops, paths = install(t, s.m.ops, read_candidates(self.path, t)[name])

        row = self.judge_model(name, t, ops, paths)
        s.say(str(row))
        row = row._replace(sections=self.judge_sections(name, t, ops, paths))
        s.say(f"candidate {name}: {verdict(row)}")
        return row

    def judge_model(self, name: str, t: ModuleType, ops: Any, paths: set[str]) -> CandidateRow:
        """Compare the whole model's errors and times."""
        s = self.s
        model = zero_model(s, t, s.h, ops, s.m.dtype)
        copy_weights(model, self.run.model)
        other = self.run._replace(model=model, loss_fn=s.m.compile(model.loss))
        errors = model_errors(model, other.loss_fn, self.tokens, self.exact)
        pairs = time_pairs(s, self.run, other)
        return CandidateRow(
            name=name,
            paths=sorted(paths),
            plain=self.plain_errors,
            errors=errors,
            plain_ms=typical(s, "forward+backward, plain", [pair.plain for pair in pairs]),
            ms=typical(s, f"forward+backward, candidate {name}", [pair.other for pair in pairs]),
            wins=sum(pair.other < pair.plain for pair in pairs),
            pairs=len(pairs),
            sections=[],
        )

    def judge_sections(self, name: str, t: ModuleType, ops: Any, paths: set[str]) -> list[SectionRow]:
        """Compare every section that uses a replaced function. One that fails is skipped."""
        s = self.s

        def used(t: ModuleType, ops: Any) -> list[Section]:
            return [section for section in sections_of(s, t, ops, s.m.dtype) if paths & set(section.uses)]

        rows = []
        for section, plain in zip(used(t, ops), used(s.t, s.m.ops)):
            try:
                row = self.judge_section(section, plain, t, ops)
            except Exception as error:
                s.skip(f"candidate {name}, section {section.name}", error)
                continue
            rows.append(row)
            s.say(str(row))
        return rows

    def judge_section(self, section: Section, plain: Section, t: ModuleType, ops: Any) -> SectionRow:
        """Compare one section's times and errors; the plain figures are measured once."""
        s = self.s
        if section.name not in self.known:
            errors = section_errors(s, s.t, s.m.ops, section.name)
            self.known[section.name] = PlainSection(time_section(s, plain), errors)
        known = self.known[section.name]

        times = time_section(s, section)
        return SectionRow(
            section=section.name,
            plain_forward_ms=known.times.forward,
            plain_backward_ms=known.times.backward,
            forward_ms=times.forward,
            backward_ms=times.backward,
            plain_errors=known.errors,
            errors=section_errors(s, t, ops, section.name),
        )


def compare(s: Session, run: TrainingParts, path: Path, names: list[str]) -> None:
    """Compare every named candidate; print and report each. One that fails is skipped with its reason."""
    s.say(f"\ncandidates: {', '.join(names)}; first the plain model, compiled and in float64")
    s.progress.begin("bench: the plain model")
    comparison = Comparison(s, run, path)
    s.say(f"plain model: {comparison.plain_errors}")
    s.progress.begin("bench: candidates")
    for name in s.progress.each(names, "candidates"):
        try:
            s.report["candidates"].append(row_json(comparison.judge(name)))
        except Exception as error:
            s.skip(f"candidate {name}", error)
            s.report["skipped"][-1]["trace"] = traceback.format_exc()
            s.say("".join(traceback.format_exception_only(type(error), error)).rstrip())
