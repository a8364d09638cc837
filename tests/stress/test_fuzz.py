"""No bytes make the artifact reader do more than refuse in one line. fuzz_artifact.py tries more."""

import copy
import json
import lzma
import math
import pickle
import random
from pathlib import Path

import pytest
import torch.distributed as dist

import train_gpt as t
from tests.audit.audit_helpers import main_here
from tests.helpers import english_dataset, stop_one_line
from tests.stress import bombs, fuzz_artifact, mutations, reader
from tests.stress.mutations import ENCODING, NAME, OFFSET, SHAPE
from tests.stress.xz_streams import blocks, compress


@pytest.fixture(scope="module")
def base():
    return mutations.small_artifact()


def edited(base, change):
    """Return `base` as an artifact whose header change(header) has changed."""
    header = copy.deepcopy(base.header)
    change(header)
    return mutations.with_header(base, header)


def test_the_sound_artifact_is_read(base):
    assert reader.outcome(base.blob) == ("read", "")
    assert reader.outcome(mutations.with_header(base, base.header)) == ("read", "")


@pytest.mark.parametrize("codec", t.CODECS)
def test_every_truncation_is_refused(base, codec):
    blob = t.CODECS[codec].pack(base.raw)
    for length in range(len(blob)):
        assert reader.outcome(blob[:length])[0] == "refused", length


def test_every_truncation_below_the_compression_is_refused(base):
    """A sound stream of less than the artifact, as if its writer had died."""
    head = len(base.raw) - len(base.payload)
    for length in [*range(0, head, 7), *range(head, len(base.raw), 101), len(base.raw) - 1]:
        assert reader.outcome(compress(base.raw[:length]))[0] == "refused", length


@pytest.mark.parametrize("codec", t.CODECS)
def test_every_single_bit_matters_to_the_container(base, codec):
    """Flip one bit in each byte: if the codec does not notice, the tensors are the same."""
    rng = random.Random(0)
    tensors = t.unpack_artifact(base.blob)
    packed = t.CODECS[codec].pack(base.raw)
    for i in range(len(packed)):
        blob = bytearray(packed)
        blob[i] ^= 1 << rng.randrange(8)
        if reader.outcome(bytes(blob)).verdict == "read":
            read = t.unpack_artifact(bytes(blob))
            assert all((tensor == tensors[name]).all() for name, tensor in read.items()), i


@pytest.mark.parametrize("name", fuzz_artifact.ALL)
def test_mutations(name, base, tmp_path, monkeypatch):
    monkeypatch.setattr(mutations, "MARK", str(tmp_path / "ran"))
    bad = []
    seen = set()
    for i in range(150):
        blob = fuzz_artifact.ALL[name](random.Random(f"{name} {i}"), base)
        try:
            seen.add(reader.outcome(blob)[0])
        except reader.Violation as error:
            bad.append(f"case {i}: {error}")
    assert not bad, bad[:5]
    assert seen - {"read"}, "nothing was refused: the mutation does nothing"
    assert name != "odd_values" or "read" in seen, "codes within their limit are codes"
    assert not list(tmp_path.iterdir()), "code in the blob ran"


def test_the_pickle_would_have_an_effect(tmp_path, monkeypatch):
    monkeypatch.setattr(mutations, "MARK", str(tmp_path / "ran"))
    pickle.loads(pickle.dumps(mutations.Payload())).close()
    assert (tmp_path / "ran").exists()


def set_first(field, value):
    """Return a change of one field of the first tensor's entry."""

    def change(header):
        header["tensors"][0][field] = value

    return change


def with_config(**values):
    """Return a change of the config."""
    return lambda header: header["config"].update(values)


def config_list(header):
    """Replace the config by the list of its keys."""
    header["config"] = sorted(header["config"])


# Name -> change of a header that the reader must refuse.
REFUSED = {
    "config is the list of its keys": config_list,
    "an offset of 0.0": set_first(OFFSET, 0.0),
    "an offset of -0.0": set_first(OFFSET, -0.0),
    "an offset of false": set_first(OFFSET, False),
    "an offset of nan": set_first(OFFSET, math.nan),
    "a shape of true": set_first(SHAPE, [True]),
    "a shape of one float": set_first(SHAPE, [8.0]),
    "a shape of null": set_first(SHAPE, None),
    "a shape of text": set_first(SHAPE, "88"),
    "a shape of huge numbers": set_first(SHAPE, [2**27] * 20),
    "a shape of more than int64": set_first(SHAPE, [2**70]),
    "a shape of zero": set_first(SHAPE, [0]),
    "an encoding of 5,000 letters": set_first(ENCODING, "x" * 5000),
    "an encoding over two lines": set_first(ENCODING, "a\nb"),
    "an encoding of null": set_first(ENCODING, None),
    "an encoding of list": set_first(ENCODING, ["int6"]),
    "a name of null": set_first(NAME, None),
    "a name that comes twice": lambda header: header["tensors"].append(list(header["tensors"][0])),
    "no config": lambda header: header.pop("config"),
    "a third key": lambda header: header.update(more=1),
    "a bool for an int": with_config(num_layers=True),
    "an int for a float": with_config(rope_base=10000),
    "a string for an int": with_config(vocab_size="16"),
}


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_codes_keep_their_limit(base, bits):
    """Refuse a code beyond the limit, first or last in any quantised tensor; read one at the limit."""
    base = base if bits == 8 else mutations.small_artifact(embed_bits=bits)
    quantised = [span for span in mutations.spans(base) if t.ENCODINGS[span.encoding].limit]
    assert {span.encoding for span in quantised} == {"int6", "int8", f"int{bits}"}
    for encoding, start, count in quantised:
        limit = t.ENCODINGS[encoding].limit
        for code in {limit, -limit, min(limit + 1, 127), -limit - 1, -128}:
            for position in (start, start + count - 1):
                payload = bytearray(base.payload)
                payload[position] = code & 255
                verdict, reason = reader.outcome(mutations.with_header(base, base.header, bytes(payload)))
                assert verdict == ("read" if abs(code) <= limit else "refused"), (encoding, code)
                assert verdict == "read" or f"a code beyond {limit}" in reason


@pytest.mark.parametrize("name", REFUSED)
def test_headers_that_must_be_refused(name, base):
    verdict, reason = reader.outcome(edited(base, REFUSED[name]))
    assert verdict == "refused" and len(reason) < 200, reason


def test_a_seeded_run_of_all_mutations_is_the_same_twice():
    assert fuzz_artifact.fuzz(90, 5)[0] == fuzz_artifact.fuzz(90, 5)[0]


def test_hand_made_streams_are_xz():
    parts = [b"one", b"two" * 1000, b"x"]
    blob = blocks((parts[0], 1), (parts[1], 50), (parts[2], 2))
    assert lzma.decompress(blob) == parts[0] + parts[1] * 50 + parts[2] * 2


CI_BOMBS = [
    *("1 GiB of zeros", "streams of zeros", "a dictionary of 4 GiB", "a header of empty lists"),
    *(
        "trellis, the tallest tensor",
        "rans, a side of 1 GiB",
        "rans, a row too many",
        "rans, a thousand tensors",
    ),
]


@pytest.fixture(scope="module")
def reports():
    return {report.bomb: report for report in bombs.bomb_reports(CI_BOMBS)}


@pytest.mark.parametrize("name", CI_BOMBS)
def test_bombs(name, reports):
    """Refuse a file of a few hundred kilobytes in seconds and in bounded memory."""
    report = reports[name]
    assert report.outcome == "refused", report
    assert report.size < 1_000_000


@pytest.mark.long
@pytest.mark.slow
def test_all_bombs():
    bad = [report for report in bombs.bomb_reports() if report.outcome == reader.VIOLATION]
    assert not bad, bad


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def scored():
    """Make an artifact that fits a dataset, which the command reads if nothing is wrong."""
    data = english_dataset()
    return mutations.small_artifact(
        vocab_size=data.vocab_size, eval_seq_len=32, eval_stride=16, train_seq_len=16, eval_batch_tokens=64
    )


def knobs(tmp_path):
    """Return the arguments that score an artifact on english_dataset()."""
    return [f"data_path={english_dataset().path}", f"out_dir={tmp_path / 'logs'}", "run_id=x"]


# Name -> function of a sound artifact that returns the bytes of a file that the command must refuse.
FILES = {
    "empty": lambda a: b"",
    "truncated": lambda a: a.blob[:-100],
    "bytes after it": lambda a: a.blob + b"x",
    "a pickle": lambda a: pickle.dumps(mutations.Payload()),
    "xz around a pickle": lambda a: lzma.compress(pickle.dumps(mutations.Payload())),
    "a page": lambda a: b"<html>Not found</html>",
    "a config list": lambda a: edited(a, config_list),
    "an offset of 0.0": lambda a: edited(a, set_first(OFFSET, 0.0)),
    "an unknown encoding": lambda a: edited(a, set_first(ENCODING, "int4")),
    "a tensor of another name": lambda a: edited(a, set_first(NAME, "another")),
    "one layer more": lambda a: edited(a, with_config(num_layers=3)),
    "a million layers": lambda a: edited(a, with_config(num_layers=10**6)),
    "no layers": lambda a: edited(a, with_config(num_layers=0)),
    "no heads": lambda a: edited(a, with_config(num_heads=0)),
    "a negative stride": lambda a: edited(a, with_config(eval_stride=-1)),
    "a stride of zero": lambda a: edited(a, with_config(eval_stride=0)),
    "a softcap of nan": lambda a: edited(a, with_config(logit_softcap=math.nan)),
    "a softcap of infinity": lambda a: edited(a, with_config(logit_softcap=math.inf)),
    "a width of 400 digits": lambda a: edited(a, with_config(model_dim=10**400)),
    "an mlp of 1e308": lambda a: edited(a, with_config(mlp_mult=1e308)),
    "a sequence of 400 digits": lambda a: edited(a, with_config(eval_seq_len=10**400)),
    "a start of 400 digits": lambda a: edited(a, with_config(bos_id=10**400)),
    "another vocabulary": lambda a: edited(a, with_config(vocab_size=7)),
}


@pytest.mark.parametrize("command", ["eval", "audit"])
@pytest.mark.parametrize("name", FILES)
def test_the_command_refuses_in_one_line(command, name, scored, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(mutations, "MARK", str(tmp_path / "ran"))
    file = tmp_path / "bad.int6.xz"
    file.write_bytes(FILES[name](scored))
    said = stop_one_line([command, str(file), *knobs(tmp_path)], capfd, main=main_here)
    assert len(said) < 1000, said
    assert not (tmp_path / "ran").exists() and not (tmp_path / "logs").exists(), "something was done first"
    assert not dist.is_initialized()


@pytest.mark.parametrize("command", ["eval", "audit"])
def test_the_command_refuses_what_is_no_file(command, tmp_path, capfd):
    for path in (tmp_path, tmp_path / "missing.xz", Path("x" * 300)):
        said = stop_one_line([command, str(path), *knobs(tmp_path)], capfd, main=main_here)
        assert str(path)[:100] in said


def test_configs_at_random(scored, tmp_path, monkeypatch):
    """A header with any config is refused with InputError, or gives a model that can be scored."""
    rng = random.Random(3)
    refused = 0
    argv = knobs(tmp_path)[:2]
    for i in range(60):
        key = rng.choice(t.STORED_KNOBS)
        kind = type(getattr(t.Config, key))
        value = rng.choice(
            [0, 1, 2, 3, 7, 16, 64, -1, 2**31, 2**63, 10**30, 10**400, 10**308, 1e-300 * 1e-20]
        )
        try:
            value = kind(value)
        except OverflowError:
            value = math.inf
        file = tmp_path / f"{i}.xz"
        file.write_bytes(edited(scored, with_config(**{key: value})))
        try:
            run, _ = t.load_run(str(file), [*argv, f"run_id={i}"], {})
            x = t.torch.zeros(1, run.h.eval_seq_len, dtype=t.torch.long)
            run.nats_fn(x, x, 1)
        except t.InputError as error:
            refused += 1
            assert "\n" not in str(error), (key, value)
        except Exception as error:
            raise AssertionError(f"{key}={value!r:.40}: {type(error).__name__}: {error}") from None
        finally:
            if dist.is_initialized():  # most are refused before there is a group
                dist.destroy_process_group()
    assert 20 < refused < 60


def test_the_same_artifact_is_scored_when_nothing_is_wrong(scored, tmp_path, capsys):
    file = tmp_path / "good.int6.xz"
    file.write_bytes(scored.blob)
    assert t.main(["eval", str(file), *knobs(tmp_path), "eval_batch_tokens=2048"]) == 0
    assert "\nscore: val_bpb " in capsys.readouterr().out
    assert json.loads(json.dumps(scored.header))["config"]["eval_seq_len"] == 32
