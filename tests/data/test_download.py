"""The verbs `download` and `auto`, with a hub in a folder."""

import hashlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

import download
import offline
import prepare
import shards
import tokenizing
import train_gpt
from tests.data.data_cases import content, make_documents, one_line, replaced


def token_stream(model, documents):
    """Return the ids of documents with BOS, one after the other."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return np.concatenate([[1, *ids] for ids in processor.encode(documents)]).astype("<u2")


def write_shard(path, tokens):
    """Write a shard of uint16 tokens."""
    path.write_bytes(shards.shard_header(len(tokens)) + tokens.tobytes())


@pytest.fixture
def hub(tmp_path, model, monkeypatch):
    """Make a hub of one repository: four train shards of 600 tokens (the last of 350), val and a tokenizer.

    `calls` lists the files that were fetched from it.
    """
    huggingface_hub = pytest.importorskip("huggingface_hub")
    remote = tmp_path / "remote"
    calls = []
    folder = remote / "datasets" / "datasets" / "toy"
    folder.mkdir(parents=True)
    (remote / "datasets" / "tokenizers").mkdir()
    shutil.copy(model, remote / "datasets" / "tokenizers" / "toy.model")

    train = token_stream(model, make_documents(0, 60, 120))
    for number, (start, end) in enumerate([(0, 600), (600, 1200), (1200, 1800), (1800, 2150)]):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", train[start:end])
    val = token_stream(model, make_documents(900, 6))
    write_shard(folder / "fineweb_val_000000.bin", val)

    class Api:
        def list_repo_tree(self, repo, path, repo_type):
            assert (repo, repo_type) == ("owner/toy", "dataset")
            yield SimpleNamespace(path=f"{path}/sub")  # a folder has no size
            for p in sorted((remote / path).iterdir()):
                raw = p.read_bytes()
                large = SimpleNamespace(sha256=hashlib.sha256(raw).hexdigest())
                yield SimpleNamespace(
                    path=f"{path}/{p.name}",
                    size=len(raw),
                    lfs=large if p.suffix == ".bin" else None,
                    blob_id=hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest(),
                )

    def hf_hub_download(repo, path, repo_type, local_dir):
        calls.append(path.rsplit("/", 1)[-1])
        target = Path(local_dir) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(remote / path, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(download, "probe_hub", lambda timeout=4.0: None)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 600)
    monkeypatch.setattr(download, "SEQUENCE", 16)
    scored = (len(val) - 1) // 16 * 16
    tokenizer = tokenizing.open_tokenizer(model)
    size = tokenizing.count_bytes([folder / "fineweb_val_000000.bin"], tokenizer, scored).scored
    monkeypatch.setattr(download, "VAL_BYTES", (size, size))
    variant = download.Variant(
        repo="owner/toy",
        folder="datasets/datasets/toy",
        tokenizer="datasets/tokenizers/toy.model",
        first_train=0,
        val_scored=scored,
    )
    monkeypatch.setitem(download.VARIANTS, prepare.DEFAULT_VARIANT, variant)
    return SimpleNamespace(remote=remote, folder=folder, calls=calls, val=val, api=huggingface_hub)


def test_download_and_extend(tmp_path, hub, model):
    out = tmp_path / "got"
    assert prepare.main(["download", "--train-shards", "2", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
        "fineweb_val_000000.bin",
        "manifest.json",
        "tokenizer.model",
    ]

    manifest = shards.load_manifest(out)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    val = manifest["splits"]["val"]
    assert val["documents"] == 6 and val["tokens"] == len(hub.val)
    assert val["decoded_bytes"] == sum(len(sp.decode(s).encode()) for s in sp.encode(make_documents(900, 6)))
    assert manifest["splits"]["train"]["tokens"] == 1200
    assert prepare.main(["verify", str(out)]) == 0  # shard 1 begins inside a document, after a full one

    hub.calls.clear()
    assert prepare.main(["download", "--train-shards", "4", "--out", str(out)]) == 0
    assert hub.calls == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]

    hub.calls.clear()
    assert prepare.main(["download", "--train-shards", "1", "--out", str(out)]) == 0
    assert hub.calls == []
    assert len(shards.load_manifest(out)["splits"]["train"]["shards"]) == 4
    assert prepare.main(["verify", str(out)]) == 0


def test_download_resumes_and_keeps_the_old_dataset(tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "got"
    assert prepare.main(["download", "--out", str(out)]) == 0
    good = hub.api.hf_hub_download

    def breaks(repo, path, **kwargs):
        if path.endswith("train_000002.bin"):
            raise ConnectionError("cable pulled")
        return good(repo, path, **kwargs)

    monkeypatch.setattr(hub.api, "hf_hub_download", breaks)
    assert prepare.main(["download", "--train-shards", "3", "--out", str(out)]) == 3
    assert "not reachable" in one_line(capsys)
    assert shards.check_dataset(out, deep=True) == []  # the one-shard dataset is untouched

    monkeypatch.setattr(hub.api, "hf_hub_download", good)
    hub.calls.clear()
    assert prepare.main(["download", "--train-shards", "3", "--out", str(out)]) == 0
    assert hub.calls == ["fineweb_train_000002.bin"]
    assert not (out / ".download").exists()


def test_download_repairs_a_damaged_file(tmp_path, hub):
    out = tmp_path / "got"
    assert prepare.main(["download", "--out", str(out)]) == 0
    path = out / "fineweb_train_000000.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-4] + b"\0\0\0\0")  # same size, other bytes
    hub.calls.clear()
    assert prepare.main(["download", "--out", str(out)]) == 0
    assert hub.calls == ["fineweb_train_000000.bin"] and path.read_bytes() == raw


def damage_empty(path):
    path.write_bytes(b"")


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def damage_byte(path):
    raw = path.read_bytes()
    path.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])


@pytest.mark.parametrize("damage", [damage_empty, damage_cut, damage_byte])
@pytest.mark.parametrize("name", ["tokenizer.model", "fineweb_val_000000.bin"])
def test_download_fetches_any_damaged_file_again(tmp_path, hub, name, damage):
    out = tmp_path / "got"
    assert prepare.main(["download", "--out", str(out)]) == 0
    good = (out / name).read_bytes()
    damage(out / name)
    assert prepare.main(["verify", str(out)]) == 1
    assert prepare.main(["download", "--out", str(out)]) == 0
    assert (out / name).read_bytes() == good and len(hub.calls) == 4
    assert prepare.main(["verify", str(out)]) == 0


def test_a_tokenizer_left_by_a_stopped_download_is_checked(tmp_path, hub, model):
    out = tmp_path / "got"
    (out / ".download").mkdir(parents=True)
    (out / ".download" / "tokenizer.model").write_bytes(model.read_bytes()[:-9])
    assert prepare.main(["download", "--out", str(out)]) == 0
    assert (out / "tokenizer.model").read_bytes() == model.read_bytes()


def test_a_tokenizer_cut_on_its_way_is_refused(tmp_path, hub, monkeypatch, capsys):
    good = hub.api.hf_hub_download

    def cut(repo, path, **kwargs):
        got = good(repo, path, **kwargs)
        if path.endswith(".model"):
            damage_cut(Path(got))
        return got

    monkeypatch.setattr(hub.api, "hf_hub_download", cut)
    assert prepare.main(["download", "--out", str(tmp_path / "got")]) == 2
    line = one_line(capsys)
    assert "tokenizer.model" in line
    assert "bytes arrived" in line
    assert "repeat the command" in line

    (hub.remote / "datasets" / "tokenizers" / "toy.model").unlink()
    assert prepare.main(["download", "--out", str(tmp_path / "got")]) == 2
    assert "toy.model: no longer on the hub; choose another --variant" in one_line(capsys)


def test_two_variants_do_not_share_a_folder(tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "got"
    monkeypatch.setitem(download.VARIANTS, "sp1024", download.VARIANTS["sp8192"])
    assert prepare.main(["download", "--out", str(out)]) == 0
    before = content(out)
    assert prepare.main(["download", "--variant", "sp1024", "--out", str(out)]) == 2
    assert "holds another dataset (sp8192, not sp1024); choose another --out" in one_line(capsys)
    assert content(out) == before


def test_download_leaves_other_datasets_alone(hub, files, capsys):
    assert prepare.main(files.args) == 0
    before = content(files.out)
    assert prepare.main(["download", "--out", str(files.out)]) == 2
    assert "toy_train_000000.bin, of another dataset" in one_line(capsys)
    assert content(files.out) == before

    assert prepare.main([*replaced(files.args, name="fineweb"), "--replace"]) == 0
    assert prepare.main(["download", "--out", str(files.out)]) == 2
    assert "holds another dataset (text, not sp8192)" in one_line(capsys)


def test_download_repairs_a_damaged_manifest(tmp_path, hub):
    out = tmp_path / "got"
    assert prepare.main(["download", "--out", str(out)]) == 0
    before = content(out)
    (out / "manifest.json").write_bytes(b"{")
    assert prepare.main(["download", "--out", str(out)]) == 0
    assert content(out) == before


def test_download_refusals(tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "got"
    for count, says in (("0", "choose 1 or more"), ("5", "has 4 train shards; choose 1 to 4")):
        assert prepare.main(["download", "--train-shards", count, "--out", str(out)]) == 2
        assert says in one_line(capsys)
    good = hub.api.hf_hub_download

    def cut(repo, path, **kwargs):
        got = good(repo, path, **kwargs)
        Path(got).write_bytes(Path(got).read_bytes()[:-2])
        return got

    monkeypatch.setattr(hub.api, "hf_hub_download", cut)
    shutil.copytree(hub.remote / "datasets" / "tokenizers", out)
    (out / "toy.model").rename(out / "tokenizer.model")
    assert prepare.main(["download", "--out", str(out)]) == 2
    line = one_line(capsys)
    assert "fineweb_val_000000.bin" in line and "bytes arrived" in line
    assert not (out / "manifest.json").exists() and not shards.shard_files(out)

    monkeypatch.setattr(hub.api, "hf_hub_download", good)
    short = hub.folder / "fineweb_train_000000.bin"
    short.write_bytes(shards.shard_header(599) + short.read_bytes()[1024:-2])
    assert prepare.main(["download", "--out", str(out)]) == 2
    assert "599 tokens, a full shard has 600; the hub's copy has changed: use another" in one_line(capsys)

    short.write_bytes(b"\0" + short.read_bytes()[1:])
    assert prepare.main(["download", "--out", str(out)]) == 2
    assert "not a token shard" in (line := one_line(capsys))
    assert "use another --variant" in line


def test_download_refuses_another_validation_split(tmp_path, hub, capsys):
    write_shard(hub.folder / "fineweb_val_000000.bin", np.concatenate([hub.val, hub.val]))
    assert prepare.main(["download", "--out", str(tmp_path / "got")]) == 2
    assert "scores on it would not compare" in one_line(capsys)
    assert not (tmp_path / "got" / "manifest.json").exists()


def test_download_refuses_a_validation_split_that_begins_inside_a_document(tmp_path, hub, capsys):
    write_shard(hub.folder / "fineweb_val_000000.bin", hub.val[1:])
    assert prepare.main(["download", "--out", str(tmp_path / "got")]) == 2
    assert "not BOS (1); the hub's copy has changed" in one_line(capsys)


@pytest.mark.parametrize("verb", ["download", "auto"])
def test_the_default_dataset_is_the_one_that_the_trainer_reads_by_default(verb):
    variant = prepare.make_parser().parse_args([verb]).variant
    assert prepare.variant_folder(variant) == prepare.ROOT / train_gpt.Config().data_path


@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_the_remedy_for_missing_data_makes_what_a_preset_reads(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data_path = train_gpt.load_config([f"preset={preset}"], {}).data_path
    with pytest.raises(train_gpt.InputError) as e:
        train_gpt.split_files(data_path, "train")
    remedy = str(e.value).partition("; ")[2]
    command, made = re.match(r"`./run.sh data (.+)` makes (\S+),", remedy).groups()
    variant = re.fullmatch(made.replace("NAME", "(.+)"), data_path)[1]
    args = prepare.make_parser().parse_args(command.replace("NAME", variant).split())
    assert prepare.variant_folder(args.variant) == prepare.ROOT / data_path


def test_official_constants():
    assert download.VARIANTS["sp1024"].val_scored == 62_021_632
    assert download.SEQUENCE == 2048
    for scored in (62_021_632, 40_540_160):
        assert scored % download.SEQUENCE == 0
    low, high = download.VAL_BYTES
    assert low < 151_073_878 and 151_080_169 < high < 151_100_000


def test_unreachable_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert prepare.main(["download", "--out", str(tmp_path / "got")]) == 3
    assert "./run.sh data offline" in one_line(capsys) and not (tmp_path / "got").exists()


PHASES = ("read: ", "drop duplicates: ", "train tokenizer: ", "tokenize ")  # of making the offline corpus


def test_auto(tmp_path, hub, sources, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "DATASETS", tmp_path / "datasets")
    monkeypatch.setattr(offline, "installed", lambda: sources)
    monkeypatch.setattr(offline, "VOCABULARIES", {"sp1024": 400, "sp8192": 420})

    def gone(timeout=4.0):
        raise download.HubUnreachable("unplugged")

    said = []  # on stderr by the last run

    def run(*extra):
        assert prepare.main(["auto", "--workers", "1", *extra]) == 0
        captured = capsys.readouterr()
        said[:] = [line for line in captured.err.splitlines() if not line.startswith(PHASES)]
        return captured.out

    with monkeypatch.context() as patch:
        patch.setattr(download, "probe_hub", gone)
        corpus = tmp_path / "datasets" / "offline_sp8192"
        assert run() == f"data_path={corpus}\n"
        assert said[:3] == [
            f"{tmp_path / 'datasets' / 'fineweb10B_sp8192'}: not there yet",
            "the Hugging Face hub is not reachable (unplugged)",
            f"using the offline corpus in {corpus} instead",
        ]
        assert run() == f"data_path={corpus}\n"  # which is no news the second time
        command = "./run.sh data download --variant sp8192"
        assert said == [f"{corpus}: the offline corpus again; FineWeb: {command}"]
        assert run("--variant", "sp1024") == f"data_path={tmp_path / 'datasets' / 'offline_sp1024'}\n"
        assert run("--variant", "gpt2") == f"data_path={tmp_path / 'datasets' / 'offline_sp1024'}\n"
    for variant, pieces in offline.VOCABULARIES.items():
        manifest = shards.load_manifest(tmp_path / "datasets" / f"offline_{variant}")
        assert manifest["tokenizer"]["vocab_size"] == pieces

    fineweb = tmp_path / "datasets" / "fineweb10B_sp8192"
    assert run("--train-shards", "2") == f"data_path={fineweb}\n"
    monkeypatch.setattr(download, "probe_hub", gone)
    assert run() == f"data_path={fineweb}\n" and said == []
    assert run("--train-shards", "3") == f"data_path={fineweb}\n"  # what is there is used
    assert said == [f"{fineweb}: 2 of 3 train shards, the Hugging Face hub is not reachable (unplugged)"]

    (fineweb / "fineweb_val_000000.bin").unlink()
    assert "offline_sp8192" in run()
    assert "fineweb_val_000000.bin: no such file" in said[0] and "unplugged" in said[1]
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    assert run() == "data_path=datasets/offline_sp8192\n"
