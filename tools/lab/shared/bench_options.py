"""The options of bench. Imports no torch, so that run.sh checks them before it finds data."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ledger.files import check_output, named_path
from script import TRAINER, BadInput

SUSTAIN = 8.0  # seconds of training's own loop on a GPU
MAX_STEPS = 100  # a timeline has no more


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises BadInput."""

    def error(self, message: str) -> None:
        """Raise BadInput in place of ending the process."""
        raise BadInput(f"{message}; --help lists the options of bench")


def make_parser(description: str) -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="bench.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("knobs", nargs="*", metavar="key=value", help="knobs of Config: preset=h100x1 ...")
    add("--script", type=Path, default=TRAINER, metavar="PATH",
        help="the train_gpt.py to time; default: the repository's")  # fmt: skip
    add("--json", type=named_path, metavar="FILE", help="also write every figure to FILE")
    add("--candidates", type=Path, metavar="FILE.py", help="compare the replacements in its CANDIDATES")
    add("--only", metavar="NAME,NAME", help="compare only these candidates")
    add("--all", action="store_true", help="with --candidates: also measure what bench measures without")
    add("--sustain", type=float, metavar="S",
        help=f"seconds of training's own loop ({SUSTAIN:g} on a GPU, 0 on a CPU; 0: none)")  # fmt: skip
    add("--timeline", type=named_path, metavar="FILE.json",
        help="instead: trace whole steps: compute, communication, what is exposed (timeline.py)")  # fmt: skip
    add("--steps", type=int, default=5, metavar="N", help="steps of the timeline (5)")
    add("--attention", action="store_true",
        help="instead: time every attention of this machine on several masks (attention.py)")  # fmt: skip
    add("--paths", metavar="NAME,NAME", help="of the attention: cudnn, flash, varlen, flex, flash4, ...")
    add("--seconds", type=float, default=100.0, metavar="S",
        help="begin no further section after this long (100; --sustain is not counted)")  # fmt: skip
    return parser


def read_options(argv: list[str], description: str = "") -> argparse.Namespace:
    """Parse the options and check their values, alone and together. Raises BadInput.

    description: what --help prints above the options.
    """
    args = make_parser(description).parse_intermixed_args(argv)
    if not args.seconds >= 0:
        raise BadInput(f"--seconds {args.seconds:g}: give 0 or more")
    if not 1 <= args.steps <= MAX_STEPS:
        raise BadInput(f"--steps {args.steps}: give 1 to {MAX_STEPS}")
    for option, path in (("--json", args.json), ("--timeline", args.timeline)):
        if path:
            check_output(option, path)
    if args.only and not args.candidates:
        raise BadInput("--only needs --candidates FILE.py")
    if args.all and not args.candidates:
        raise BadInput("--all needs --candidates FILE.py; without it bench measures everything")
    if args.paths is not None and not args.attention:
        raise BadInput("--paths needs --attention")
    if args.sustain is not None:
        check_sustain(args)
    if args.candidates and not args.candidates.is_file():
        raise BadInput(f"--candidates {args.candidates}: no such file; tools/lab/model/plain_paths.py is one")
    return args


def check_sustain(args: argparse.Namespace) -> None:
    """Raise BadInput unless --sustain is a time and training's steps are measured at all."""
    if not 0 <= args.sustain < math.inf:
        raise BadInput(f"--sustain {args.sustain:g}: not a number of seconds")
    only_candidates = args.candidates and not args.all
    if args.attention or args.timeline or only_candidates:
        raise BadInput(
            "--sustain times bench's own steps: leave out --attention and --timeline, "
            "and add --all to --candidates"
        )
