"""Load a train_gpt.py by path, the repository's or a record's, for all tools. Imports no torch."""

from __future__ import annotations

import dataclasses
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRAINER = ROOT / "train_gpt.py"


class BadInput(Exception):
    """An error the user can fix: one line that names the file, key or value and the remedy."""


def missing_names(module: ModuleType, needs: tuple[str, ...]) -> list[str]:
    """Return the entries of `needs` that the module lacks. CLASS.NAME is a method or dataclass field."""

    def has(name: str) -> bool:
        owner, _, member = name.partition(".")
        kind = getattr(module, owner, None)
        fields = getattr(kind, "__dataclass_fields__", {})
        return hasattr(module, owner) and (not member or hasattr(kind, member) or member in fields)

    return [name for name in needs if not has(name)]


def require_names(module: ModuleType, path: Path, needs: tuple[str, ...], tool: str) -> None:
    """Raise BadInput if the module, loaded from `path`, lacks a name that the tool uses."""
    if lacking := missing_names(module, needs):
        raise BadInput(
            f"{path}: this script has no {', '.join(lacking)}, which {tool} needs; "
            f"{tool} it with the tools of the commit that it comes from"
        )


def load_script(path: Path, name: str, needs: tuple[str, ...], tool: str) -> ModuleType:
    """Import the script at `path` from its text, so that no bytecode beside it is used or written.

    name: its key in sys.modules. Two copies need two names: each registers its operators under its own.
    needs: the names of the script that the tool uses. tool: its own name, for messages.
    Raises BadInput if the file cannot be read, does not import or lacks a name.
    """
    loader = SourceFileLoader(name, str(path))
    try:
        source = loader.get_data(str(path))
    except OSError as error:
        raise BadInput(
            f"{path}: cannot read the script ({error.strerror}); --script PATH names one"
        ) from None

    module = module_from_spec(spec_from_loader(name, loader))
    sys.modules[name] = module
    try:
        exec(loader.source_to_code(source, str(path)), module.__dict__)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(f"{path}: does not import here ({reason}); fix it or {tool} another") from None

    require_names(module, path, needs, tool)
    return module


def one_layer(h: Any) -> Any:
    """Return a script's Config with one layer, visited once, which has the parts that layers of `h` have."""
    counts = {key: min(1, getattr(h, key, 0)) for key in ("ve_last_n", "parallel_last_n")}
    smaller = dict(num_layers=1, xsa_last_n=1, loop_layers="", loop_times=0) | counts
    return dataclasses.replace(h, **{key: value for key, value in smaller.items() if hasattr(h, key)})
