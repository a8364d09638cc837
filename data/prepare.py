"""Get data: FineWeb shards from the Hugging Face hub, shards from your own text, or a corpus made offline.

    ./run.sh data VERB ...      or      python data/prepare.py VERB ...

Verbs: download, text, offline, auto, verify. `VERB --help` explains each. Progress and errors go to stderr.
Exit status: 0 done; 1 verify found a fault, or memory or a library failed; 2 bad input; 3 hub not reachable;
130 interrupted; 143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports, Ctrl-C shows no traceback

if __name__ == "__main__" and getattr(sys.flags, "safe_path", False):  # PYTHONSAFEPATH leaves this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import build
import download
import offline
import shards
from messages import BadInput, answer, describe, explain, guard_console, is_panic, one_line, say
from tokenizing import check_held_out, open_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DATASETS = ROOT / "data" / "datasets"
DEFAULT_VARIANT = "sp8192"  # of FineWeb; the trainer's default data_path names its folder

Verbs = argparse._SubParsersAction  # argparse has no public name for it


# ---- verbs ---------------------------------------------------------------------------------------


def shown(path: str | Path) -> Path:
    """Return a path as it is printed: relative to the repository if it is inside."""
    path = Path(path).resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def report(folder: Path, manifest: shards.Manifest, is_new: bool) -> None:
    """Say what a dataset folder holds. is_new: whether it was written just now."""
    say(f"{shown(folder)}: {'written' if is_new else 'already there'}")
    for split, about in sorted(manifest["splits"].items()):
        documents = "" if about["documents"] is None else f"{about['documents']:,} documents, "
        say(f"  {split}: {documents}{about['tokens']:,} tokens in {len(about['shards'])} shards")


def variant_folder(variant: str) -> Path:
    """Return the folder of a variant unless --out names another."""
    return DATASETS / f"fineweb10B_{variant}"


def offline_folder(variant: str) -> Path:
    """Return the folder of the offline corpus unless --out names another."""
    return DATASETS / f"offline_{variant}"


def run_download(args: argparse.Namespace) -> None:
    """Fetch published shards."""
    out = Path(args.out) if args.out else variant_folder(args.variant)
    download.download_dataset(args.variant, args.train_shards, out)
    report(out, shards.load_manifest(out), is_new=True)


def run_text(args: argparse.Namespace) -> None:
    """Build a dataset from the user's documents."""
    out = Path(args.out)
    splits = {"train": args.train, "val": args.val}
    for item in args.split:
        split, _, path = item.partition("=")
        if not path:
            raise BadInput(f"--split {item!r}: give NAME=FILE, such as val_news=news.txt")
        splits.setdefault(split, []).append(path)
    if not 1 <= args.shard_tokens <= shards.MAX_SHARD_TOKENS:
        raise BadInput(f"--shard-tokens {args.shard_tokens}: choose 1 to {shards.MAX_SHARD_TOKENS}")

    options = build.BuildOptions(
        key=args.field, shard_tokens=args.shard_tokens, workers=args.workers, replace=args.replace
    )
    name = out.resolve().name if args.name is None else args.name
    build.check_names(name, splits)
    tokenizer = open_tokenizer(args.tokenizer)
    source = build.text_source(splits, options)
    built = build.build_dataset(out, name, tokenizer, splits=splits, source=source, options=options)
    report(out, *built)


def run_offline(args: argparse.Namespace) -> None:
    """Build the offline corpus."""
    out = Path(args.out) if args.out else offline_folder(args.variant)
    built = offline.build_corpus(out, args.workers, vocab=offline.VOCABULARIES[args.variant])
    report(out, *built)


def run_auto(args: argparse.Namespace) -> None:
    """Find or get FineWeb, else the offline corpus, and print data_path=DIR as the last line on stdout."""
    folder = variant_folder(args.variant)
    if (folder / shards.MANIFEST).exists():
        problems = shards.check_dataset(folder, deep=False)
    else:
        problems = [f"{shown(folder)}: not there yet"]
    present_shards = 0
    if not problems:
        present_shards = len(shards.load_manifest(folder)["splits"]["train"]["shards"])

    unreachable = None  # why the hub is
    if problems or (args.train_shards or 0) > present_shards:
        try:
            download.download_dataset(args.variant, args.train_shards or 1, folder)
            problems = []
        except download.HubUnreachable as error:
            unreachable = str(error).split(";")[0]
    if problems:
        fineweb_is_damaged = (folder / shards.MANIFEST).exists()
        folder = use_offline(args, [problems[0], unreachable], fineweb_is_damaged)
    elif unreachable is not None:
        say(f"{shown(folder)}: {present_shards} of {args.train_shards} train shards, {unreachable}")
    answer(f"data_path={shown(folder)}")


def use_offline(args: argparse.Namespace, reasons: list[str], fineweb_is_damaged: bool) -> Path:
    """Build the offline corpus if it is not there yet, and return its folder.

    reasons: why it is not FineWeb. They are shown the first time, and whenever FineWeb is there but damaged.
    """
    variant = args.variant if args.variant in offline.VOCABULARIES else "sp1024"
    folder = offline_folder(variant)
    is_known = (folder / shards.MANIFEST).exists() and not fineweb_is_damaged
    if not is_known:
        for reason in reasons:
            say(reason)
        say(f"using the offline corpus in {shown(folder)} instead")
    built = offline.build_corpus(folder, args.workers, vocab=offline.VOCABULARIES[variant])
    if built.is_new or not is_known:
        report(folder, *built)
    else:
        command = f"./run.sh data download --variant {args.variant}"
        say(f"{shown(folder)}: the offline corpus again; FineWeb: {command}")
    return folder


def run_verify(args: argparse.Namespace) -> int:
    """Check a dataset folder, print what is wrong with it and return the exit status."""
    problems = shards.check_dataset(args.folder, deep=True)
    if not problems:
        problems = check_held_out(args.folder, shards.load_manifest(args.folder))
    for problem in problems:
        say(one_line(problem))
    if problems:
        return 1

    manifest = shards.load_manifest(args.folder)
    files = sum(len(split["shards"]) for split in manifest["splits"].values())
    digest = shards.sha256_file(Path(args.folder) / shards.MANIFEST)
    answer(f"{shown(args.folder)}: ok, {files} shards, manifest sha256 {digest}")
    return 0


# ---- the command line ----------------------------------------------------------------------------


def folder_name(text: str) -> str:
    """Return the value of an option that names a folder. An empty one is often an unset variable."""
    if not text:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return text


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    add_download(verbs)
    add_text(verbs)
    add_offline(verbs)
    add_auto(verbs)
    add_verify(verbs)
    return parser


def add_verb(verbs: Verbs, function: Callable, summary: str, example: str) -> Parser:
    """Add the verb of a function called run_VERB, with an example of its arguments, and return its parser."""
    name = function.__name__.removeprefix("run_")
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary}.",
        epilog=f"example: ./run.sh data {name} {example}".rstrip(),
    )
    parser.set_defaults(function=function)
    return parser


def add_download(verbs: Verbs) -> None:
    """Add the verb `download`."""
    parser = add_verb(
        verbs,
        run_download,
        "fetch published FineWeb shards from the Hugging Face hub",
        "--variant sp8192 --train-shards 10",
    )
    add_variant(parser)
    parser.add_argument(
        "--train-shards", type=int, default=1, metavar="N", help="train shards, 200 MB each (1)"
    )
    parser.add_argument(
        "--out", type=folder_name, metavar="DIR", help="dataset folder (data/datasets/fineweb10B_VARIANT)"
    )


def add_text(verbs: Verbs) -> None:
    """Add the verb `text`."""
    parser = add_verb(
        verbs,
        run_text,
        "turn documents into shards: .txt (separated by NUL), .jsonl, both also .zst",
        "--train a.jsonl b.jsonl --val v.txt.zst --tokenizer gpt2 --out data/datasets/mine",
    )
    parser.add_argument("--train", nargs="+", required=True, metavar="FILE", help="training documents")
    parser.add_argument("--val", nargs="+", required=True, metavar="FILE", help="held-out documents")
    parser.add_argument(
        "--split", action="append", default=[], metavar="NAME=FILE", help="another held-out split; repeatable"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="X", help="SentencePiece .model or tiktoken name"
    )
    parser.add_argument("--out", type=folder_name, required=True, metavar="DIR", help="dataset folder")
    parser.add_argument("--name", help="file name prefix of the shards (name of DIR)")
    parser.add_argument("--field", default="text", help="the text field of .jsonl (text)")
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=shards.SHARD_TOKENS,
        metavar="N",
        help=f"most tokens in a shard; cuts only documents that are longer ({shards.SHARD_TOKENS})",
    )
    add_workers(parser, note="; no effect on the output")
    parser.add_argument("--replace", action="store_true", help="overwrite another dataset in DIR")


def add_offline(verbs: Verbs) -> None:
    """Add the verb `offline`."""
    parser = add_verb(
        verbs, run_offline, "build a corpus without a network, from installed documentation", ""
    )
    add_variant(parser, offline.VOCABULARIES, default="sp1024")  # its text is small
    parser.add_argument(
        "--out", type=folder_name, metavar="DIR", help="dataset folder (data/datasets/offline_VARIANT)"
    )
    add_workers(parser)


def add_auto(verbs: Verbs) -> None:
    """Add the verb `auto`."""
    parser = add_verb(
        verbs,
        run_auto,
        "get FineWeb if it is reachable, else build the offline corpus; prints data_path=DIR",
        "",
    )
    add_variant(parser)
    parser.add_argument(
        "--train-shards", type=int, metavar="N", help="train shards wanted (1, or those already there)"
    )
    add_workers(parser)


def add_verify(verbs: Verbs) -> None:
    """Add the verb `verify`."""
    parser = add_verb(
        verbs,
        run_verify,
        "check every byte of a dataset folder; one line per problem",
        "data/datasets/fineweb10B_sp8192",
    )
    parser.add_argument("folder", type=folder_name, metavar="DIR", help="dataset folder")


def add_variant(
    parser: Parser, variants: Iterable[str] = download.VARIANTS, default: str = DEFAULT_VARIANT
) -> None:
    """Add the option --variant."""
    parser.add_argument(
        "--variant", choices=sorted(variants), default=default, help=f"tokenizer family ({default})"
    )


def add_workers(parser: Parser, note: str = "") -> None:
    """Add the option --workers: by default, one process per core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes ({cores}){note}")


def check_numbers(args: argparse.Namespace) -> None:
    """Raise BadInput if an option counts less than one of something."""
    for name in ("workers", "train_shards"):
        count = getattr(args, name, None)
        if count is not None and count < 1:
            raise BadInput(f"--{name.replace('_', '-')} {count}: choose 1 or more")


def main(argv: list[str]) -> int:
    """Run one verb and return the exit status."""
    guard_console()
    args = make_parser().parse_args(argv)
    try:
        check_numbers(args)
        return args.function(args) or 0
    except BadInput as error:
        say(f"error: {one_line(error)}")
        return error.status
    except OSError as error:
        say(f"error: {one_line(explain(error))}")
        return 2
    except KeyboardInterrupt as signalled:
        say("\ninterrupted; nothing half-written is left, repeat the command to continue")
        return 128 + (signalled.args[0] if signalled.args else signal.SIGINT)
    except MemoryError:
        say("error: out of memory; use fewer --workers or smaller documents")
        return 1
    except BaseException as error:
        if not is_panic(error):
            raise
        say(f"error: a library failed ({describe(error)}); check the input and the installed packages")
        return 1


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM as Ctrl-C, so that workers end and temporary files go."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
