"""Write copies of train_gpt.py whose optimizer keeps and sends the matrices in other ways.

    ./run.sh record layouts --out DIR
    ./run.sh bench --script DIR/separate_products.py preset=h100x1
    NPROC=2 ./run.sh bench --timeline t.json --script DIR/whole_banks.py preset=h100x1

train_gpt.py has one layout: banks, each cut into one share per rank. A copy is the script with a module of
lab/layout at its end, which puts functions and classes of its own in the place of a few of the script's. It
trains the same weights; only `published_order` clips another norm. What a part of the layout is worth is the
difference between the script and the copy that lacks it.

The exit status is 0 when done and 2 for bad input, which one line names.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: Ctrl-C shows no traceback

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

from ledger.files import check_output, named_path, read_text, write_atomic
from ledger.run_verb import run_verb
from older_scripts import missing_names
from script import TRAINER, BadInput, load_script

FOLDER = Path(__file__).parent / "layout"
LAYOUTS = ("separate_products", "separate_tensors", "whole_banks", "published_order", "one_stream")


class Layout(NamedTuple):
    """A module of lab/layout, read from its text."""

    name: str
    about: str  # what differs: the first paragraph of its docstring
    needs: tuple[str, ...]  # what it takes from the trainer or overrides; CLASS.NAME is a method
    definitions: str  # the module without its docstring and without what it takes from the trainer


def overridden(node: ast.stmt, needs: list[str]) -> list[str]:
    """Return the methods of the trainer that a class overrides: all that it defines."""
    if not isinstance(node, ast.ClassDef):
        return []
    bases = [base.id for base in node.bases if base.id in needs]
    methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
    return [f"{base}.{method}" for base in bases for method in methods]


def read_layout(name: str) -> Layout:
    """Read a module of lab/layout."""
    source = read_text(FOLDER / f"{name}.py")
    tree = ast.parse(source)
    docstring, *body = tree.body
    needs = []
    left_out = [docstring]
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module in ("__future__", "train_gpt"):
            left_out.append(node)
        if isinstance(node, ast.ImportFrom) and node.module == "train_gpt":
            needs += [alias.name for alias in node.names]
    for node in body:
        needs += overridden(node, needs)

    lines = source.splitlines(keepends=True)
    for node in left_out:
        for number in range(node.lineno, node.end_lineno + 1):
            lines[number - 1] = ""
    definitions = re.sub(r"\n{4,}", "\n\n\n", "".join(lines).strip("\n"))
    about = " ".join(ast.get_docstring(tree).split("\n\n")[0].split())
    return Layout(name, about, tuple(needs), definitions)


def with_layout(source: str, layout: Layout, path: Path = TRAINER) -> str:
    """Return the source of a trainer that has the layout. Raises BadInput if it does not end by calling main.

    path: where the trainer lies, for messages.
    """
    last = ast.parse(source).body[-1]
    if not isinstance(last, ast.If):
        raise BadInput(
            f'{path}: the script does not end with `if __name__ == "__main__":`; use a train_gpt.py'
        )
    lines = source.splitlines(keepends=True)
    call_of_main = "".join(lines[last.lineno - 1 :])
    trainer = "".join(lines[: last.lineno - 1])
    banner = f"# {'-' * 77}\n# The layout {layout.name}, put here by `./run.sh record layouts`."
    return f"{trainer}{banner}\n\n{layout.definitions}\nglobals().update(REPLACES)\n\n\n{call_of_main}"


def make_copies(path: Path) -> dict[Layout, str]:
    """Return the trainer at `path` with each layout. Raises BadInput if it lacks what a layout needs."""
    layouts = [read_layout(name) for name in LAYOUTS]
    script = load_script(path, "script_of_layouts", (), "copy")
    for layout in layouts:
        if lacking := missing_names(script, layout.needs):
            raise BadInput(
                f"{path}: this script has no {', '.join(lacking)}, which the layout {layout.name} needs; use "
                "the train_gpt.py that belongs to this tool"
            )
    source = read_text(path)
    return {layout: with_layout(source, layout, path) for layout in layouts}


def command(args: argparse.Namespace) -> int:
    """Write every copy. Returns the exit status."""
    copies = make_copies(args.script)
    paths = {layout: args.out / f"{layout.name}.py" for layout in copies}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise BadInput(f"{args.out}: not a folder; name another with --out") from None
    for path in paths.values():  # all copies or none
        check_output("the copy", path)
    for layout, path in paths.items():
        write_atomic(path, copies[layout])
        print(f"{path}: {layout.about}")
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    text = "write copies of train_gpt.py whose optimizer keeps and sends the matrices in other ways"
    parser = argparse.ArgumentParser(prog="record layouts", description=text)
    parser.add_argument("--out", type=named_path, required=True, metavar="DIR", help="folder for the copies")
    parser.add_argument("--script", type=Path, default=TRAINER, metavar="PATH", help="another train_gpt.py")
    return parser


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit status."""
    args = argument_parser().parse_args(argv)
    return run_verb(lambda: command(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
