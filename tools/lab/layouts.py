"""Write copies of train_gpt.py whose optimizer keeps and sends the matrices in other ways.

    ./run.sh record layouts --out DIR
    ./run.sh bench --script DIR/separate_products.py preset=h100x1
    NPROC=2 ./run.sh bench --timeline t.json --script DIR/whole_banks.py preset=h100x1

train_gpt.py has one layout: banks, each cut into one share per rank. A copy is the script with a few exact
substitutions, and trains the same weights; only `published_order` clips another norm. What a part of the
layout is worth is the difference between the script and the copy that lacks it. The parts are those of
parameter-golf #399.

The exit status is 0 when done and 2 for bad input, which one line names.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: Ctrl-C shows no traceback

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from ledger.files import check_output, named_path, read_text, write_atomic
from ledger.run_verb import run_verb
from script import TRAINER, BadInput


class Edit(NamedTuple):
    """A substitution. `old` stands in the script exactly once."""

    old: str
    new: str


class Layout(NamedTuple):
    """A copy of the script: its name, what differs, and the substitutions that make it."""

    name: str
    about: str
    edits: tuple[Edit, ...]


SEPARATE_PRODUCTS = Layout(
    "separate_products",
    "each matrix is orthogonalized by products of its own, not with its bank",
    (
        Edit(
            "                    for matrices in self.owned[buffer]:\n",
            "                    owned = self.owned[buffer]\n"
            "                    singles = [one for matrices in owned for one in single_matrices(matrices)]\n"
            "                    for matrices in singles:\n",
        ),
        Edit(
            "class FlatBuffers(NamedTuple):\n",
            '''def single_matrices(matrices: OwnedMatrices) -> list[OwnedMatrices]:
    """Split the matrices of a parameter into groups of one."""
    parts = [[None] * len(matrices.weights) if part is None else part.split(1) for part in matrices]
    return [OwnedMatrices(*one) for one in zip(*parts)]


class FlatBuffers(NamedTuple):
''',
        ),
    ),
)
SEPARATE_TENSORS = Layout(
    "separate_tensors",
    "weights and gradients of matrices lie outside the banks and are copied in and out, matrix by matrix",
    (
        Edit(
            "            self.move(p, bank[first:end].view_as(p), grad[first:end].view_as(p))\n"
            "            self.own(buffer, name, p, first)\n",
            "            self.join(p, bank[first:end].view_as(p), grad[first:end].view_as(p))\n"
            "            self.own(buffer, name, p, first)\n",
        ),
        Edit(
            "    def own(self, buffer: str, name: str, p: nn.Parameter, first: int) -> None:\n",
            '''    def join(self, p: nn.Parameter, value: Tensor, grad: Tensor) -> None:
        """Leave p where it is. Remember which part of its bank follows it, matrix by matrix."""
        value.copy_(p.data)
        p.grad = torch.zeros_like(p)
        if not hasattr(self, "joined"):
            self.joined = ([], [], [], [])
        for tensors, whole in zip(self.joined, (p.data, p.grad, value, grad)):
            tensors.extend(whole.unbind())

    def own(self, buffer: str, name: str, p: nn.Parameter, first: int) -> None:
''',
        ),
        Edit(
            "        arrivals = []\n        for buffer, grad in self.bank_grad.items():\n",
            "        torch._foreach_copy_(self.joined[3], self.joined[1])\n"
            "        torch._foreach_zero_(self.joined[1])\n"
            "        arrivals = []\n        for buffer, grad in self.bank_grad.items():\n",
        ),
        Edit(
            "\n    def squared_norms(self) -> Tensor:\n",
            "        torch._foreach_copy_(self.joined[0], self.joined[2])  # the end of `schedule`\n"
            "\n    def squared_norms(self) -> Tensor:\n",
        ),
        Edit(
            "        torch._foreach_copy_(self.state(), saved.state)\n",
            "        torch._foreach_copy_(self.state(), saved.state)\n"
            "        torch._foreach_copy_(self.joined[0], self.joined[2])\n",
        ),
        Edit(
            "        torch._foreach_zero_([*self.bank_grad.values(), self.flat_grad])\n",
            "        torch._foreach_zero_([*self.bank_grad.values(), self.flat_grad, *self.joined[1]])\n",
        ),
    ),
)
LAUNCH = """                arrivals.append(
                    reduce_scatter(
                        wire[level.kept],
                        wire[level.whole],
                        op=dist.ReduceOp.AVG,
                        group=level.group,
                        async_op=True,
                    )
                )
"""
WHOLE_BANKS = Layout(
    "whole_banks",
    "gradients of whole banks are averaged on every rank, as DDP would; each rank uses its share",
    (
        Edit(
            LAUNCH,
            """                arrivals.append(
                    dist.all_reduce(
                        wire[level.whole], op=dist.ReduceOp.AVG, group=level.group, async_op=True
                    )
                )
""",
        ),
    ),
)
PUBLISHED_ORDER = Layout(
    "published_order",
    "each rank clips by the norm of its own gradients before they are averaged; small parameters are updated "
    "while banks are in flight, and each bank is waited for just before its update",
    (
        Edit(
            "        arrivals = []\n        for buffer, grad in self.bank_grad.items():\n",
            "        grads = [*self.bank_grad.values(), self.flat_grad]\n"
            "        squares = torch.stack(torch._foreach_norm(grads, 2, torch.float64)).square()\n"
            "        torch._foreach_mul_(grads, self.gradient_factor(squares))\n"
            "        flights = {}\n"
            "        for buffer, grad in self.bank_grad.items():\n"
            "            arrivals = flights[buffer] = []\n",
        ),
        Edit(
            """        arrivals.append(dist.all_reduce(flat_wire, op=dist.ReduceOp.AVG, async_op=True))
        for work in arrivals:
            work.wait()

        # 2. Take one norm over all gradients. Every rank has a share of each bank, and the whole flat buffer.
        squares = self.squared_norms()
        bank_squares = squares[:-1]
        dist.all_reduce(bank_squares)  # in place, within squares
        factor = self.gradient_factor(squares)
""",
            """        dist.all_reduce(flat_wire, op=dist.ReduceOp.AVG, async_op=True).wait()
        factor = torch.ones((), device=self.m.device)  # gradients are clipped already
""",
        ),
        Edit(
            "                    for matrices in self.owned[buffer]:\n",
            "                    flights[buffer][-1].wait()\n"
            "                    for matrices in self.owned[buffer]:\n",
        ),
    ),
)
LAYOUTS = (SEPARATE_PRODUCTS, SEPARATE_TENSORS, WHOLE_BANKS, PUBLISHED_ORDER)


def with_layout(source: str, layout: Layout, path: Path = TRAINER) -> str:
    """Return the source of a trainer with another layout. Raises BadInput if it lacks a place to edit.

    path: of the trainer, for messages.
    """
    for edit in layout.edits:
        if source.count(edit.old) != 1:
            line = edit.old.strip().splitlines()[0]
            raise BadInput(
                f"{path}: {layout.name}: the script has {line!r} with what follows "
                f"{source.count(edit.old)} times, and once is needed; use the train_gpt.py that belongs to "
                "this tool"
            )
        source = source.replace(edit.old, edit.new)
    return source


def command(args: argparse.Namespace) -> int:
    """Write every copy. Returns the exit status."""
    try:
        source = read_text(args.script)
    except BadInput as error:
        raise BadInput(f"{error}; --script PATH names a train_gpt.py") from None
    copies = {args.out / f"{layout.name}.py": with_layout(source, layout, args.script) for layout in LAYOUTS}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise BadInput(f"{args.out}: not a folder; name another with --out") from None
    for path in copies:  # all copies or none
        check_output("the copy", path)
    for layout, (path, text) in zip(LAYOUTS, copies.items()):
        write_atomic(path, text)
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
