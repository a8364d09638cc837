"""Reads what the trainer says about its knobs from its source, since the ledger runs without torch."""

from __future__ import annotations

import ast
import difflib
from functools import cache
from typing import NamedTuple

from ledger.files import read_text
from script import TRAINER

AFTER_KNOBS = "\n# 3. "  # begins the section after that of the knobs: to parse all of the file takes 0.2 s


class Knob(NamedTuple):
    """A field of Config."""

    type: str  # as the trainer's messages call it: str, bool, int or float
    traits: frozenset[str]


class Knobs(NamedTuple):
    """What a trainer says about its knobs: every knob by name, in the order of Config, and all traits."""

    by_name: dict[str, Knob]
    traits: frozenset[str]


@cache
def read_knobs() -> Knobs:
    """Return what section 2 of the trainer says."""
    tree = ast.parse(read_text(TRAINER).partition(AFTER_KNOBS)[0])
    types = types_of_annotations(tree)
    (config,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    by_name = {
        field.target.id: Knob(types[ast.unparse(field.annotation)], traits_of(field))
        for field in config.body
        if isinstance(field, ast.AnnAssign)
    }
    return Knobs(by_name, constants(tree))


def types_of_annotations(tree: ast.Module) -> dict[str, str]:
    """Return the type that each annotation stands for: the rows ANNOTATION: Kind(TYPE, ...) of KINDS."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    (kinds,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "KINDS"]
    return {
        ast.literal_eval(annotation): ast.literal_eval(kind.args[0])
        for annotation, kind in zip(kinds.keys, kinds.values)
    }


def traits_of(field: ast.AnnAssign) -> frozenset[str]:
    """Return the traits of a field NAME: ANNOTATION = knob(DEFAULT, TRAIT, ...); none without that call."""
    given = field.value.args[1:] if isinstance(field.value, ast.Call) else []
    return frozenset(argument.id for argument in given)


def constants(tree: ast.Module) -> frozenset[str]:
    """Return the names of all texts that are assigned outside functions: the traits are among them."""
    return frozenset(
        node.targets[0].id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    )


def known_knobs() -> dict[str, Knob]:
    """Return every knob of the trainer by name, in the order of Config."""
    return read_knobs().by_name


def knobs_meant(key: str) -> str:
    """Return which knobs an unknown key may stand for, as the last words of an error."""
    close = difflib.get_close_matches(key.lower(), known_knobs())
    return f"did you mean {', '.join(close)}?" if close else "./run.sh config lists them"


def with_trait(*traits: str) -> tuple[str, ...]:
    """Return the knobs that have one of the traits, in the order of Config. Raises KeyError for no trait."""
    for trait in traits:
        if trait not in read_knobs().traits:
            raise KeyError(trait)
    return tuple(name for name, knob in known_knobs().items() if not knob.traits.isdisjoint(traits))


def run_knobs() -> tuple[str, ...]:
    """Return the knobs that differ between the runs of a record, which says nothing of them."""
    return with_trait("OWN", "DATA")


def stored_knobs() -> tuple[str, ...]:
    """Return the knobs that an artifact's header can have: scoring depends on them."""
    return with_trait("STORED", "STORED_IF_SET", "STORED_IF_LEARNS")
