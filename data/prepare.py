"""Get data: FineWeb shards from the Hugging Face hub, shards from your own text, or a corpus made offline.

    ./run.sh data VERB ...      or      python data/prepare.py VERB ...

Verbs: download, text, offline, auto, verify. `VERB --help` explains each. Progress and errors go to stderr.
Exit status: 0 done, 1 bad input, 2 bad command line, 3 hub not reachable, 130 interrupted.
"""

import argparse
import errno
import os
import re
import shutil
import ssl
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))    # the modules beside this file, from any folder

import numpy as np

import shards
from shards import DataError, say

ROOT = Path(__file__).resolve().parent.parent
DATASETS = ROOT / "data" / "datasets"
SCRATCH = ".download"                           # in the dataset folder: files fetched before all are complete
SEQUENCE = 2048                                 # the challenge cuts its validation split to a multiple of it
VAL_BYTES = (151_070_000, 151_081_000)          # decoded bytes of that split, whatever the tokenizer


@dataclass(frozen=True)
class Variant:
    """Where a published export lives. folder: path in the hub's dataset repository ("" is its top)."""

    repo: str
    folder: str
    tokenizer: str                              # path of the model in the repository, or a tiktoken name
    first_train: int                            # number of the first train shard
    val_scored: int | None                      # validation targets, cut to a multiple of SEQUENCE


# Repositories and counts: openai/parameter-golf (data/README.md and the logs of its records);
# gpt2: modded-nanogpt (data/cached_fineweb10B.py), where shard 0 is the validation split.
VARIANTS = {
    "sp1024": Variant("willdepueoai/parameter-golf", "datasets/datasets/fineweb10B_sp1024",
                      "datasets/tokenizers/fineweb_1024_bpe.model", 0, 62_021_632),
    "sp8192": Variant("kevclark/parameter-golf", "datasets/datasets/fineweb10B_sp8192",
                      "datasets/tokenizers/fineweb_8192_bpe.model", 0, 40_540_160),
    "gpt2": Variant("kjj0/fineweb10B-gpt2", "", "gpt2", 1, None),
}


class HubUnreachable(DataError):
    """The hub could not be reached at all, as against: it answered and refused."""

    status = 3

    def __init__(self, reason):
        super().__init__(f"the Hugging Face hub is not reachable ({reason}); get online and repeat, "
                         "or build a corpus without a network: ./run.sh data offline")


# -----------------------------------------------------------------------------
# The hub
# -----------------------------------------------------------------------------

def probe_hub(timeout=4.0):
    """Raise HubUnreachable unless the hub answers anything within `timeout` seconds.

    One request before huggingface_hub's own, which retries for half a minute. In a thread, because a
    look-up of the name cannot be timed out.
    """
    constants = shards.require("huggingface_hub.constants")
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set")
    answer = [f"no answer in {timeout:g} s"]
    url = f"{constants.ENDPOINT}/api/datasets/{VARIANTS['sp1024'].repo}"

    def ask():
        try:
            urllib.request.urlopen(url, timeout=timeout).close()
            answer[0] = None
        except urllib.error.HTTPError as error:
            # Status 407 and 403 are a proxy's words; anything else the hub said itself.
            answer[0] = f"HTTP {error.code}" if error.code in (403, 407) else None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            # The hub's own client brings certificates, so a missing one here proves nothing.
            answer[0] = None if isinstance(reason, ssl.SSLError) else str(reason)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout + 1)
    if answer[0]:
        raise HubUnreachable(answer[0])


def hub_error(error, what):
    """The DataError for what huggingface_hub raised while fetching `what`."""
    response = getattr(error, "response", None)
    if response is not None:
        return DataError(f"{what}: the hub answered {response.status_code}; check that it is still there, or "
                         "try again later")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return DataError(shards.explain(error, what))
    return HubUnreachable(f"{what}: {type(error).__name__}")


def list_hub(variant):
    """{path: (bytes, sha256 or None)} of the shards that exist in the repository of a Variant."""
    hub = shards.require("huggingface_hub")
    try:
        tree = hub.HfApi().list_repo_tree(variant.repo, variant.folder or None, repo_type="dataset")
        return {f.path: (f.size, f.lfs.sha256 if f.lfs else None) for f in tree if hasattr(f, "size")}
    except Exception as error:                  # the client's exceptions change with its HTTP library
        raise hub_error(error, f"{variant.repo}/{variant.folder}") from None


def is_right(path, wanted):
    """Whether the file is there with the (bytes, sha256) that the hub lists; None of either: not known."""
    size, digest = wanted
    return (path.exists() and size in (None, path.stat().st_size)
            and digest in (None, shards.sha256_file(path) if digest else None))


def fetch(variant, path, out, wanted):
    """Fetch one file of a repository unless it is there; returns where it lies.

    That is `out` for a file of an earlier download, else `out`/.download, from where it moves when all are
    complete; a download cut short continues there. wanted: as `is_right`.
    """
    name, scratch = Path(path).name, out / SCRATCH
    name = shards.MODEL if name.endswith(".model") else name
    for place in (out / name, scratch / name):
        if is_right(place, wanted):
            return place
    hub = shards.require("huggingface_hub")
    try:
        got = Path(hub.hf_hub_download(variant.repo, path, repo_type="dataset", local_dir=scratch))
    except Exception as error:                  # the client's exceptions change with its HTTP library
        raise hub_error(error, f"{variant.repo}/{path}") from None
    if not is_right(got, wanted):
        size = got.stat().st_size
        got.unlink()                            # the next try must not take it for done
        raise DataError(f"{out / name}: {size} bytes arrived, not the {wanted[0]} bytes with sha256 "
                        f"{wanted[1]} that the hub lists; repeat the command")
    if name.endswith(".bin"):
        try:
            shards.read_header(got)
        except DataError as error:              # name the file as it will be called
            got.unlink()
            raise DataError(str(error).replace(str(got), str(out / name))) from None
    os.replace(got, scratch / name)
    return scratch / name


# -----------------------------------------------------------------------------
# download
# -----------------------------------------------------------------------------

def choose_files(name, listing, train_shards):
    """([(path in the repository, split)], path of the last train shard there is)."""
    variant, found = VARIANTS[name], {"train": {}, "val": {}}
    for path in listing:
        match = re.fullmatch(r"fineweb_(train|val)_(\d{6})\.bin", path.rsplit("/", 1)[-1])
        if match:
            found[match[1]][int(match[2])] = path
    train, val, first = found["train"], found["val"], variant.first_train
    if not val or sorted(train) != list(range(first, first + len(train))):
        raise DataError(f"{variant.repo}/{variant.folder}: its shards are not the ones published for {name}; "
                        "choose another --variant")
    if not 1 <= train_shards <= len(train):
        raise DataError(f"--train-shards {train_shards}: {name} has {len(train)} train shards; "
                        f"choose 1 to {len(train)}")
    chosen = [(val[i], "val") for i in sorted(val)]
    chosen += [(train[first + i], "train") for i in range(train_shards)]
    return chosen, train[max(train)]


def byte_table(tokenizer):
    """(base, space, boundary), arrays over ids: bytes, begins with a space, no text of its own.

    The challenge's definition: control, unknown and unused pieces weigh nothing; a byte piece weighs one;
    the leading space of a piece counts unless the token before it is a boundary. tiktoken: plain lengths.
    """
    base = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    space, boundary = np.zeros_like(base, dtype=bool), np.zeros_like(base, dtype=bool)
    if tokenizer.kind == "tiktoken":
        bpe = shards.require("tiktoken").get_encoding(tokenizer.encoding)
        for token in set(bpe._mergeable_ranks.values()):
            base[token] = len(bpe.decode_single_token_bytes(token))
        return base, space, boundary
    sp = shards.require("sentencepiece").SentencePieceProcessor(model_proto=tokenizer.blob)
    for token in range(tokenizer.vocab_size):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            boundary[token] = True
        elif sp.is_byte(token):
            base[token] = 1
        else:
            piece = sp.id_to_piece(token)
            space[token] = piece.startswith("\u2581")
            base[token] = len(piece[int(space[token]):].encode())
    return base, space, boundary


def count_bytes(paths, tokenizer, limit):
    """(UTF-8 bytes of all tokens, of the targets 1..limit) of a split. limit: targets scored, tokens."""
    base, space, boundary = byte_table(tokenizer)
    total = scored = position = 0
    previous_boundary = True
    for path in paths:
        tokens = shards.load_tokens(path)
        for start in range(0, len(tokens), 1 << 22):
            ids = tokens[start:start + (1 << 22)].astype(np.int64)
            before = np.concatenate(([previous_boundary], boundary[ids[:-1]]))
            sizes = base[ids] + (space[ids] & ~before)
            total += int(sizes.sum())
            scored += int(sizes[max(1 - position, 0):max(limit + 1 - position, 0)].sum())
            previous_boundary = boundary[ids[-1]]
            position += len(ids)
    return total, scored


def describe_split(places, tokenizer):
    """The manifest's entry for the shard files of a downloaded split: token counts and checksums."""
    entries = []
    for place in places:
        tokens = shards.load_tokens(place)
        if int(tokens.max()) >= tokenizer.vocab_size:
            raise DataError(f"{place}: token id {int(tokens.max())}, vocab_size is {tokenizer.vocab_size}; "
                            "wrong tokenizer or damaged file: remove it and repeat")
        entries.append({"file": place.name, "tokens": len(tokens), "sha256": shards.sha256_file(place)})
    return {"documents": None, "tokens": sum(e["tokens"] for e in entries), "text_bytes": None,
            "decoded_bytes": None, "shards": entries}


def describe_val(places, tokenizer, variant):
    """`describe_split` with documents and decoded bytes. DataError unless the published totals are met."""
    about = describe_split(places, tokenizer)
    scored = (about["tokens"] - 1) // SEQUENCE * SEQUENCE
    total, scored_bytes = count_bytes(places, tokenizer, scored)
    low, high = VAL_BYTES
    if variant.val_scored and (scored != variant.val_scored or not low <= scored_bytes <= high):
        raise DataError(f"{places[0]}: {scored:,} scored tokens and {scored_bytes:,} bytes, the official "
                        f"split has {variant.val_scored:,} and {low:,} to {high:,}; scores on it would not "
                        "compare: remove it and repeat, or use another --variant")
    documents = sum(int(np.count_nonzero(shards.load_tokens(p) == tokenizer.bos_id)) for p in places)
    return {**about, "documents": documents, "decoded_bytes": total}


def fetch_all(variant, files, listing, out):
    """{split: [where its files lie]}, after fetching every (path, split) of `files`."""
    places = {"train": [], "val": []}
    needed = sum(listing[path][0] or 0 for path, _ in files
                 if not any((folder / Path(path).name).exists() for folder in (out, out / SCRATCH)))
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(f"{out}: {shards.mb(needed)} to fetch, {shards.mb(free)} free; free some space, "
                        "choose an --out on a larger disk or fewer --train-shards")
    progress = shards.Progress("download", sum(listing[path][0] or 0 for path, _ in files))
    done = 0
    for path, split in files:
        places[split].append(fetch(variant, path, out, listing[path]))
        done += listing[path][0] or 0
        progress.update(done)
    progress.close(f"{len(files)} files, {shards.mb(done)}")
    return places


def download(name, train_shards, out):
    """Make `out` hold the first `train_shards` of a variant, its val split and its tokenizer.

    Files that are right already are not fetched again, and more train shards than asked for are kept.
    """
    variant = VARIANTS[name]
    utils = shards.require("huggingface_hub.utils")
    utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    probe_hub()
    listing = list_hub(variant)
    choose_files(name, listing, train_shards)   # refuses a number out of range
    have = [int(p.stem[-6:]) - variant.first_train + 1 for p in out.glob("fineweb_train_[0-9]*.bin")]
    if max(have, default=0) > train_shards:
        train_shards = max(have)
        say(f"{out} already goes up to {train_shards} train shards; keeping them")
    files, last = choose_files(name, listing, train_shards)
    with shards.Staging(out) as staging:
        own_model = "/" in variant.tokenizer
        model = fetch(variant, variant.tokenizer, out, (None, None)) if own_model else variant.tokenizer
        tokenizer = shards.open_tokenizer(str(model))
        places = fetch_all(variant, files, listing, out)
        for place in places["train"]:
            tokens = shards.read_header(place)
            if place.name != Path(last).name and tokens != shards.SHARD_TOKENS:
                raise DataError(f"{place}: {tokens:,} tokens, a full shard has {shards.SHARD_TOKENS:,}; "
                                "remove it and repeat")
        say("checking every token")
        splits = {"val": describe_val(places["val"], tokenizer, variant),
                  "train": describe_split(places["train"], tokenizer)}
        for place in [*places["train"], *places["val"], *([model] if own_model else [])]:
            staging.adopt(place)
        staging.commit({"format": shards.FORMAT, "name": "fineweb", "tokenizer": tokenizer.entry(),
                        "bos_id": tokenizer.bos_id, "splits": splits,
                        "source": {"kind": "download", "repo": variant.repo, "variant": name}})
    shutil.rmtree(out / SCRATCH, ignore_errors=True)


# -----------------------------------------------------------------------------
# Commands
# -----------------------------------------------------------------------------

def shown(path):
    """A path as printed: relative to the repository root when below it."""
    path = Path(path).resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def report(folder, manifest, fresh):
    """Say what a dataset folder holds."""
    say(f"{shown(folder)}: {'written' if fresh else 'already there'}")
    for split, about in sorted(manifest["splits"].items()):
        documents = "" if about["documents"] is None else f"{about['documents']:,} documents, "
        say(f"  {split}: {documents}{about['tokens']:,} tokens in {len(about['shards'])} shards")


def default_folder(variant):
    """Where a variant goes unless --out says otherwise."""
    return DATASETS / f"fineweb10B_{variant}"


def run_download(args):
    """The verb download."""
    out = Path(args.out) if args.out else default_folder(args.variant)
    download(args.variant, args.train_shards, out)
    report(out, shards.load_manifest(out), True)


def run_text(args):
    """The verb text."""
    out = Path(args.out)
    splits = {"train": args.train, "val": args.val}
    for item in args.split:
        split, equals, path = item.partition("=")
        if not equals or not path:
            raise DataError(f"--split {item!r}: give NAME=FILE, such as val_news=news.txt")
        splits.setdefault(split, []).append(path)
    if not 1 <= args.shard_tokens <= shards.MAX_SHARD_TOKENS:
        raise DataError(f"--shard-tokens {args.shard_tokens}: choose 1 to {shards.MAX_SHARD_TOKENS}")
    if args.workers < 1:
        raise DataError(f"--workers {args.workers}: choose 1 or more")
    options = shards.BuildOptions(args.field, args.shard_tokens, args.workers, args.replace)
    name = args.name or out.resolve().name
    shards.check_names(name, splits)
    tokenizer = shards.open_tokenizer(args.tokenizer)
    source = shards.text_source(splits, options)
    report(out, *shards.build(out, name, tokenizer, splits, source, options))


def run_offline(args):
    """The verb offline."""
    import offline
    out = Path(args.out) if args.out else DATASETS / "offline_sp1024"
    report(out, *offline.build(out, args.workers))


def run_auto(args):
    """The verb auto: whatever data can be had; its last line on stdout is for scripts."""
    folder = default_folder(args.variant)
    present = (folder / shards.MANIFEST).exists()
    problems = shards.check_dataset(folder, deep=False) if present else [f"{shown(folder)}: not there yet"]
    have = 0 if problems else len(shards.load_manifest(folder)["splits"]["train"]["shards"])
    if problems:
        say(problems[0])
    if problems or (args.train_shards or 0) > have:
        try:
            download(args.variant, args.train_shards or 1, folder)
            problems = []
        except HubUnreachable as error:
            say(str(error).split(";")[0])
    if problems:
        import offline
        folder = DATASETS / "offline_sp1024"
        say(f"using the offline corpus in {shown(folder)} instead")
        report(folder, *offline.build(folder, args.workers))
    print(f"data_path={shown(folder)}")


def run_verify(args):
    """The verb verify."""
    problems = shards.check_dataset(args.folder, deep=True)
    for problem in problems:
        say(problem)
    if problems:
        return 1
    manifest = shards.load_manifest(args.folder)
    files = sum(len(split["shards"]) for split in manifest["splits"].values())
    print(f"{shown(args.folder)}: ok, {files} shards, manifest sha256 "
          f"{shards.sha256_file(Path(args.folder) / shards.MANIFEST)}")
    return 0


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser():
    """The command line."""
    top = Parser(prog="data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def verb(name, function, summary, example):     # one sub-command with its example
        added = verbs.add_parser(name, help=summary, description=f"{summary}.",
                                 epilog=f"example: ./run.sh data {name} {example}".rstrip())
        added.set_defaults(function=function)
        return added

    p = verb("download", run_download, "fetch published FineWeb shards from the Hugging Face hub",
             "--variant sp1024 --train-shards 10")
    p.add_argument("--variant", choices=sorted(VARIANTS), default="sp1024", help="tokenizer family (sp1024)")
    p.add_argument("--train-shards", type=int, default=1, metavar="N", help="train shards, 200 MB each (1)")
    p.add_argument("--out", metavar="DIR", help="dataset folder (data/datasets/fineweb10B_VARIANT)")

    p = verb("text", run_text, "turn documents into shards: .txt (separated by NUL), .jsonl, both also .zst",
             "--train a.jsonl b.jsonl --val v.txt.zst --tokenizer gpt2 --out data/datasets/mine")
    p.add_argument("--train", nargs="+", required=True, metavar="FILE", help="training documents")
    p.add_argument("--val", nargs="+", required=True, metavar="FILE", help="held-out documents")
    p.add_argument("--split", action="append", default=[], metavar="NAME=FILE",
                   help="another held-out split; repeatable")
    p.add_argument("--tokenizer", required=True, metavar="X", help="SentencePiece .model or tiktoken name")
    p.add_argument("--out", required=True, metavar="DIR", help="dataset folder")
    p.add_argument("--name", help="file name prefix of the shards (name of DIR)")
    p.add_argument("--field", default="text", help="the text field of .jsonl (text)")
    p.add_argument("--shard-tokens", type=int, default=shards.SHARD_TOKENS, metavar="N",
                   help=f"most tokens in a shard ({shards.SHARD_TOKENS})")
    p.add_argument("--workers", type=int, default=cores, metavar="N",
                   help=f"processes ({cores}); no effect on the output")
    p.add_argument("--replace", action="store_true", help="overwrite another dataset in DIR")

    p = verb("offline", run_offline, "build a corpus without a network, from installed documentation", "")
    p.add_argument("--out", metavar="DIR", help="dataset folder (data/datasets/offline_sp1024)")
    p.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes ({cores})")

    p = verb("auto", run_auto, "FineWeb if it can be had, else the offline corpus; prints data_path=DIR", "")
    p.add_argument("--variant", choices=sorted(VARIANTS), default="sp1024", help="tokenizer family (sp1024)")
    p.add_argument("--train-shards", type=int, metavar="N", help="train shards wanted (1, or what is there)")
    p.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes ({cores})")

    p = verb("verify", run_verify, "check a dataset folder to the last byte; one line per problem",
             "data/datasets/fineweb10B_sp1024")
    p.add_argument("folder", metavar="DIR")
    return top


def main(argv):
    """Run one verb; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        return args.function(args) or 0
    except DataError as error:
        say(f"error: {error}")
        return error.status
    except OSError as error:
        say(f"error: {shards.explain(error)}")
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted; nothing half-written is left, repeat the command to continue")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
