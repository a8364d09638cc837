"""Download published FineWeb shards from the Hugging Face hub into a dataset folder."""

from __future__ import annotations

import errno
import hashlib
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
from typing import NamedTuple

import numpy as np

import shards
from messages import BadInput, Progress, explain, megabytes, require, say
from tokenizing import Tokenizer, count_bytes, open_tokenizer

SCRATCH = ".download"  # folder of files that are complete while their download is not
SEQUENCE = 2048  # the challenge cuts its validation split to a multiple of it
VAL_BYTES = (151_070_000, 151_081_000)  # decoded bytes of that split, least and most over all tokenizers


@dataclass(frozen=True)
class Variant:
    """A published export of FineWeb in a dataset repository of the hub."""

    repo: str
    folder: str  # of the shards; "" is the top
    tokenizer: str  # path of the model, or the name of a tiktoken encoding
    first_train: int  # number of the first train shard
    val_scored: int | None  # validation targets, cut to a multiple of SEQUENCE


VARIANTS = {
    # Repositories and counts: openai/parameter-golf, data/README.md and the logs of its records.
    "sp1024": Variant(
        repo="willdepueoai/parameter-golf",
        folder="datasets/datasets/fineweb10B_sp1024",
        tokenizer="datasets/tokenizers/fineweb_1024_bpe.model",
        first_train=0,
        val_scored=62_021_632,
    ),
    "sp8192": Variant(
        repo="kevclark/parameter-golf",
        folder="datasets/datasets/fineweb10B_sp8192",
        tokenizer="datasets/tokenizers/fineweb_8192_bpe.model",
        first_train=0,
        val_scored=40_540_160,
    ),
    # modded-nanogpt, data/cached_fineweb10B.py: shard 0 is the validation split.
    "gpt2": Variant(repo="kjj0/fineweb10B-gpt2", folder="", tokenizer="gpt2", first_train=1, val_scored=None),
}


class HubUnreachable(BadInput):
    """The hub could not be reached; if it answered and refused, the error is a plain BadInput."""

    status = 3

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"the Hugging Face hub is not reachable ({reason}); get online and repeat, "
            "or build a corpus without a network: ./run.sh data offline"
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.reason,)  # the default would pass the whole message as the reason


class HubFile(NamedTuple):
    """Size and hash of a file, as the hub lists them."""

    size: int
    sha256: str | None  # of a large file, which the hub keeps apart from git; None for others
    git_id: str  # name of a small file in git, which is a SHA-1


# ---- the hub -------------------------------------------------------------------------------------


def probe_hub(timeout: float = 4.0) -> None:
    """Raise HubUnreachable unless the hub gives any answer within `timeout` seconds.

    This saves the half minute that huggingface_hub would spend on retries. The request has a thread of its
    own because looking up a host name has no timeout.
    """
    constants = require("huggingface_hub.constants")
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set")
    problem = f"no answer in {timeout:g} s"
    url = f"{constants.ENDPOINT}/api/datasets/{VARIANTS['sp1024'].repo}"

    def ask() -> None:
        nonlocal problem
        problem = request_problem(url, timeout)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout + 1)
    if problem:
        raise HubUnreachable(problem)


def request_problem(url: str, timeout: float) -> str | None:
    """Return why a request of `url` shows that the hub is not reachable, or None if it is reachable."""
    try:
        urllib.request.urlopen(url, timeout=timeout).close()
    except urllib.error.HTTPError as error:
        if error.code in (403, 407):  # the answers of a proxy; any other comes from the hub
            return f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        # The hub's client brings its own certificates, so a missing one proves nothing.
        if not isinstance(reason, ssl.SSLError):
            return str(reason)
    return None


def hub_error(error: Exception, path: str) -> BadInput:
    """Return the BadInput for an exception that huggingface_hub raised while fetching `path`."""
    response = getattr(error, "response", None)
    if response is not None:
        return BadInput(
            f"{path}: the hub answered {response.status_code}; check that it is still there, "
            "or try again later"
        )
    disk_errors = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
    if isinstance(error, OSError) and error.errno in disk_errors:
        return BadInput(explain(error, path))
    return HubUnreachable(f"{path}: {type(error).__name__}")


def list_hub(variant: Variant) -> dict[str, HubFile]:
    """Return {path: HubFile} of a Variant's shards and its tokenizer.

    Raises BadInput if the hub refuses or has no such tokenizer.
    """
    listing = list_folder(variant.repo, variant.folder)
    if has_model(variant):
        listing |= list_folder(variant.repo, variant.tokenizer.rpartition("/")[0])
        if variant.tokenizer not in listing:
            raise BadInput(
                f"{variant.repo}/{variant.tokenizer}: no longer on the hub; choose another --variant"
            )
    return listing


def has_model(variant: Variant) -> bool:
    """Return whether the tokenizer of a Variant is a file of its repository, not a tiktoken encoding."""
    return "/" in variant.tokenizer


def list_folder(repo: str, folder: str) -> dict[str, HubFile]:
    """Return {path: HubFile} of the files in one folder of a repository. Raises BadInput if it refuses."""
    hub = require("huggingface_hub")
    try:
        tree = hub.HfApi().list_repo_tree(repo, folder or None, repo_type="dataset")
        files = [entry for entry in tree if hasattr(entry, "size")]  # a folder has no size
        return {
            file.path: HubFile(
                size=file.size, sha256=file.lfs.sha256 if file.lfs else None, git_id=file.blob_id
            )
            for file in files
        }
    except Exception as error:  # the client's exceptions change with its HTTP library
        raise hub_error(error, f"{repo}/{folder}") from None


def is_complete(path: Path, listed: HubFile) -> bool:
    """Return whether the file exists and has the size and the hash of its HubFile."""
    if not path.is_file() or path.stat().st_size != listed.size:
        return False
    if listed.sha256:
        return shards.sha256_file(path) == listed.sha256
    return git_id(path) == listed.git_id


def git_id(path: Path) -> str:
    """Return the name that git gives to the content of a file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fetch(variant: Variant, repo_path: str, out: Path, listed: HubFile) -> Path:
    """Fetch one file of a Variant's repository unless it is complete already, and return its local path.

    A file of an earlier download is in `out`. A new one goes to `out`/.download until all are complete, and
    an interrupted download continues from there. listed: its HubFile.
    """
    name = shards.MODEL if repo_path.endswith(".model") else Path(repo_path).name
    scratch = out / SCRATCH
    for path in (out / name, scratch / name):
        if is_complete(path, listed):
            return path

    hub = require("huggingface_hub")
    try:
        got = Path(hub.hf_hub_download(variant.repo, repo_path, repo_type="dataset", local_dir=scratch))
    except Exception as error:  # the client's exceptions change with its HTTP library
        raise hub_error(error, f"{variant.repo}/{repo_path}") from None

    if not is_complete(got, listed):
        size = got.stat().st_size
        got.unlink()  # or the next attempt would take it for complete
        raise BadInput(
            f"{out / name}: {size} bytes arrived, not the {listed.size} bytes with hash "
            f"{listed.sha256 or listed.git_id} that the hub lists; repeat the command"
        )
    os.replace(got, scratch / name)
    return scratch / name


# ---- choosing and describing files ---------------------------------------------------------------


class Selection(NamedTuple):
    """Paths in the repository: of the chosen shards, and of the last train shard that there is."""

    val: list[str]
    train: list[str]
    last_train: str


def choose_files(name: str, listing: dict[str, HubFile], train_shards: int) -> Selection:
    """Return the Selection of the val split and the first `train_shards` train shards of a variant.

    Raises BadInput if the listing does not hold the shards published for `name`, or too few of them.
    """
    variant = VARIANTS[name]
    found: dict[str, dict[int, str]] = {"train": {}, "val": {}}  # split -> number -> path
    for path in listing:
        match = re.fullmatch(r"fineweb_(train|val)_(\d{6})\.bin", path.rsplit("/", 1)[-1])
        if match:
            found[match[1]][int(match[2])] = path

    train = [found["train"][number] for number in sorted(found["train"])]
    val = [found["val"][number] for number in sorted(found["val"])]
    first = variant.first_train
    if not val or sorted(found["train"]) != list(range(first, first + len(train))):
        raise BadInput(
            f"{variant.repo}/{variant.folder}: its shards are not the ones published for {name}; "
            "choose another --variant"
        )
    if not 1 <= train_shards <= len(train):
        raise BadInput(
            f"--train-shards {train_shards}: {name} has {len(train)} train shards; choose 1 to {len(train)}"
        )
    return Selection(val=val, train=train[:train_shards], last_train=train[-1])


# The files that the functions below describe have the hashes that the hub lists, so fetching them again would
# not help.
OTHER_VARIANT = "the hub's copy has changed: use another --variant"


def describe_split(paths: list[Path], tokenizer: Tokenizer) -> shards.ManifestSplit:
    """Return the manifest's entry for a downloaded split: token counts and checksums.

    Raises BadInput on a file that is not a shard and on an id outside the vocabulary.
    """
    entries = []
    for path in paths:
        check_header(path)
        tokens = shards.load_tokens(path)
        highest = int(tokens.max())
        if highest >= tokenizer.vocab_size:
            raise BadInput(
                f"{path}: token id {highest}, vocab_size is {tokenizer.vocab_size}; {OTHER_VARIANT}"
            )
        entries.append({"file": path.name, "tokens": len(tokens), "sha256": shards.sha256_file(path)})
    return {
        "documents": None,
        "tokens": sum(entry["tokens"] for entry in entries),
        "text_bytes": None,
        "decoded_bytes": None,
        "shards": entries,
    }


def describe_val(paths: list[Path], tokenizer: Tokenizer, variant: Variant) -> shards.ManifestSplit:
    """Return the entry of `describe_split` with documents and decoded bytes.

    Raises BadInput if this is not the official validation split.
    """
    about = describe_split(paths, tokenizer)
    first = int(shards.load_tokens(paths[0], most=1)[0])
    if first != tokenizer.bos_id:
        raise BadInput(
            f"{paths[0]}: begins with token {first}, not BOS ({tokenizer.bos_id}); {OTHER_VARIANT}"
        )
    scored_tokens = (about["tokens"] - 1) // SEQUENCE * SEQUENCE
    count = count_bytes(paths, tokenizer, scored_tokens)
    low, high = VAL_BYTES
    is_official = scored_tokens == variant.val_scored and low <= count.scored <= high
    if variant.val_scored and not is_official:
        raise BadInput(
            f"{paths[0]}: {scored_tokens:,} scored tokens and {count.scored:,} bytes, the official split has "
            f"{variant.val_scored:,} and {low:,} to {high:,}; scores on it would not compare; "
            f"{OTHER_VARIANT}"
        )
    documents = sum(int(np.count_nonzero(shards.load_tokens(path) == tokenizer.bos_id)) for path in paths)
    return {**about, "documents": documents, "decoded_bytes": count.total}


def check_header(path: Path) -> int:
    """Return the number of tokens of a downloaded shard. Raises BadInput if it is not a shard."""
    try:
        return shards.read_header(path)
    except BadInput as error:
        problem = str(error).rpartition("; ")[0]
        raise BadInput(f"{problem}; {OTHER_VARIANT}") from None


def check_full_shards(paths: list[Path], last_name: str) -> None:
    """Raise BadInput if a train shard other than the last one of the variant is not full."""
    for path in paths:
        tokens = check_header(path)
        if path.name != last_name and tokens != shards.SHARD_TOKENS:
            raise BadInput(
                f"{path}: {tokens:,} tokens, a full shard has {shards.SHARD_TOKENS:,}; {OTHER_VARIANT}"
            )


# ---- downloading ---------------------------------------------------------------------------------


def fetch_all(
    variant: Variant, repo_paths: list[str], listing: dict[str, HubFile], out: Path
) -> dict[str, Path]:
    """Fetch every file of `repo_paths` and return {path in the repository: local path}.

    Raises BadInput before the first request if the disk is too small.
    """
    sizes = {path: listing[path].size or 0 for path in repo_paths}
    present = [
        path
        for path in repo_paths
        if any((folder / Path(path).name).exists() for folder in (out, out / SCRATCH))
    ]
    needed = sum(sizes.values()) - sum(sizes[path] for path in present)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise BadInput(
            f"{out}: {megabytes(needed)} to fetch, {megabytes(free)} free; free some space, "
            "choose an --out on a larger disk or fewer --train-shards"
        )

    progress = Progress("download", sum(sizes.values()))
    fetched = {}
    done = 0
    for path in repo_paths:
        fetched[path] = fetch(variant, path, out, listing[path])
        done += sizes[path]
        progress.update(done)
    progress.close(f"{len(repo_paths)} files, {megabytes(done)}")
    return fetched


def quiet_hub_client() -> None:
    """Turn off the warnings of huggingface_hub, and its progress bars unless stderr is a terminal."""
    utils = require("huggingface_hub.utils")
    utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()


def refuse_another_dataset(out: Path, name: str) -> None:
    """Raise BadInput if `out` holds a dataset other than the variant `name`.

    A damaged manifest does not count: every file is compared with the hub, and the manifest is rewritten.
    """
    remedy = "choose another --out, or remove it"
    strays = [file for file in shards.shard_files(out) if not file.startswith("fineweb_")]
    if strays:
        raise BadInput(f"{out}: holds {strays[0]}, of another dataset; {remedy}")
    try:
        source = shards.load_manifest(out)["source"]
    except BadInput:
        return
    variant = VARIANTS[name]
    ours = {"kind": "download", "repo": variant.repo, "variant": name}
    if source != ours:
        found = source.get("variant") or source.get("kind")
        raise BadInput(f"{out}: holds another dataset ({found}, not {name}); {remedy}")


def present_train_shards(variant: Variant, out: Path) -> int:
    """Return how many train shards `out` holds, counted up to the highest number among them."""
    numbers = [int(path.stem[-6:]) for path in out.glob("fineweb_train_[0-9]*.bin")]
    return max(numbers, default=variant.first_train - 1) - variant.first_train + 1


def choose_more_files(name: str, listing: dict[str, HubFile], train_shards: int, out: Path) -> Selection:
    """Return the Selection of `choose_files`, with more train shards if `out` holds more already."""
    selection = choose_files(name, listing, train_shards)
    present = present_train_shards(VARIANTS[name], out)
    if present <= train_shards:
        return selection
    say(f"{out} already has {present} train shards; keeping them")
    return choose_files(name, listing, present)


def describe_dataset(
    name: str, selection: Selection, fetched: dict[str, Path], tokenizer: Tokenizer
) -> shards.Manifest:
    """Return the manifest of the fetched files of a variant. Raises BadInput on one that is not as published.

    fetched: {path in the repository: local path}.
    """
    variant = VARIANTS[name]
    val = [fetched[path] for path in selection.val]
    train = [fetched[path] for path in selection.train]
    check_full_shards(train, Path(selection.last_train).name)
    say("checking every token")
    return {
        "format": shards.MANIFEST_FORMAT,
        "name": "fineweb",
        "tokenizer": tokenizer.entry(),
        "bos_id": tokenizer.bos_id,
        "splits": {"val": describe_val(val, tokenizer, variant), "train": describe_split(train, tokenizer)},
        "source": {"kind": "download", "repo": variant.repo, "variant": name},
    }


def download_dataset(name: str, train_shards: int, out: Path) -> None:
    """Make `out` hold the first `train_shards` train shards of a variant, its val split and its tokenizer.

    Keeps files that are complete, and train shards beyond `train_shards`. Raises BadInput on bad data or
    another dataset in `out`, and HubUnreachable without a network; `out` is then as it was, apart from its
    `.download`.
    """
    variant = VARIANTS[name]
    refuse_another_dataset(out, name)
    quiet_hub_client()
    probe_hub()
    listing = list_hub(variant)
    selection = choose_more_files(name, listing, train_shards, out)

    with shards.Staging(out) as staging:
        tokenizer_name = variant.tokenizer
        if has_model(variant):
            model = fetch(variant, variant.tokenizer, out, listing[variant.tokenizer])
            staging.adopt(model)
            tokenizer_name = str(model)
        tokenizer = open_tokenizer(tokenizer_name)

        fetched = fetch_all(variant, [*selection.val, *selection.train], listing, out)
        manifest = describe_dataset(name, selection, fetched, tokenizer)
        for path in fetched.values():
            staging.adopt(path)
        staging.commit(manifest)
    shutil.rmtree(out / SCRATCH, ignore_errors=True)
