"""./run.sh sample: probabilities are those of GPT.logits, text is whole characters, a seed gives one text."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import cli
import train_gpt as t
from tests.helpers import BOS, english_dataset, noisy_model, random_tokens, tiny, train_tokenizer
from tests.use.use_cases import PARTS, refusal, write_artifact
from use import sample
from use.text import TextStream, sentencepiece_tokenizer, tiktoken_tokenizer

ODD = "Grüße, 世界! 🐟 naïve café — ∑ x² ≤ 5\n"  # characters of one to four bytes


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.fixture
def data(tmp_path):
    """A copy of the tiny data folder, to break."""
    return shutil.copytree(english_dataset().path, tmp_path / "data")


def text_of(capsys, *argv):
    """Return what sample prints on stdout."""
    capsys.readouterr()
    assert sample.main([*argv]) == 0
    return capsys.readouterr().out


# ---- probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 0), (0.8, 3), (2.0, 1), (1.0, 99)])
def test_probabilities_by_hand(temperature, top_k):
    logits = np.random.default_rng(0).normal(0, 3, 12).astype(np.float32)
    heated = np.exp(logits.astype(np.float64) / temperature)
    if 0 < top_k < 12:
        heated[np.argsort(logits)[:-top_k]] = 0
    found = sample.probabilities(torch.from_numpy(logits), temperature, top_k)
    assert np.allclose(found.numpy(), heated / heated.sum(), rtol=1e-14, atol=0)  # measured: 2.4e-16


def test_without_temperature_the_likeliest_token_is_certain():
    assert sample.probabilities(torch.tensor([0.0, 3.0, 2.0]), 0, 40).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("parts", PARTS)
def test_tokens_are_drawn_by_the_logits_of_the_last_tokens_in_reach(parts, monkeypatch):
    """The context is longer than eval_seq_len; each distribution is compared with one made here."""
    h = tiny(**PARTS[parts])
    model = noisy_model(h).requires_grad_(False)
    context = random_tokens(h, (21,)).tolist()
    drawn_from = []

    def multinomial(probabilities, count, generator):
        drawn_from.append(probabilities)
        return probabilities.argmax()[None]

    monkeypatch.setattr(torch, "multinomial", multinomial)
    settings = sample.Settings(tokens=4, temperature=0.7, top_k=5)
    tokens = list(sample.continue_tokens(model, context, settings))
    assert tokens and len(drawn_from) >= len(tokens)
    for i in range(len(tokens)):
        seen = torch.tensor([(context + tokens[:i])[-h.eval_seq_len :]])
        logits = model.logits(seen)[0, -1].double() / 0.7
        want = torch.where(logits >= logits.sort().values[-5], logits.exp(), 0.0)
        assert torch.allclose(drawn_from[i], want / want.sum(), rtol=1e-13, atol=0)  # measured: 4.3e-16


@pytest.mark.parametrize("parts", PARTS)
def test_a_window_that_is_filled_up_gives_the_same_logits(parts):
    model = noisy_model(tiny(**PARTS[parts])).requires_grad_(False)
    lengths = []
    logits = model.logits
    model.logits = lambda tokens: lengths.append(tokens.size(1)) or logits(tokens)
    for tokens in ([BOS, 7, 9], [BOS, *range(5, 25)]):
        filled = sample.next_logits(model, tokens, whole_window=True)
        assert torch.allclose(filled, sample.next_logits(model, tokens), atol=1e-5)  # measured: 6.1e-7
    assert lengths == [16, 3, 16, 16]


def test_the_text_ends_before_another_document(monkeypatch):
    model = noisy_model(tiny()).requires_grad_(False)
    ids = iter([5, 6, BOS, 7])
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: torch.tensor([next(ids)]))
    assert list(sample.continue_tokens(model, [BOS], sample.Settings())) == [5, 6]


# ---- text ----------------------------------------------------------------------------------------


def streamed(tokenizer, tokens):
    """Return the pieces of text in which a document arrives."""
    stream = TextStream(tokenizer, at_start=True)
    return [*map(stream.feed, tokens), stream.end()]


@pytest.mark.parametrize("add_dummy_prefix", [False, True])
def test_sentencepiece_text_arrives_in_whole_characters(tmp_path, add_dummy_prefix):
    import sentencepiece

    texts = ["the river runs to the sea", "a stone in the garden"] * 20
    path = train_tokenizer(tmp_path / "a.model", texts, 290, add_dummy_prefix=add_dummy_prefix)
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    tokenizer = sentencepiece_tokenizer(t, path)
    for text in (ODD.strip(), "the river", " a stone"):
        tokens = [BOS, *tokenizer.encode(text)]
        pieces = streamed(tokenizer, tokens)
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == processor.decode(tokens) == tokenizer.decode(tokens)
    assert streamed(tokenizer, tokenizer.encode("世")[:-1])[-1] == "\ufffd"  # a character without its end


def test_tiktoken_text_arrives_in_whole_characters(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"the": 256}
    encoding = tiktoken.Encoding(
        "toy", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = tiktoken_tokenizer(t, "toy")
    pieces = streamed(tokenizer, [257, *tokenizer.encode(ODD)])
    assert "".join(pieces) == ODD and "\ufffd" not in pieces
    assert tokenizer.decode([256]) == "the" and len(tokenizer.pieces) == 258


def test_a_padded_vocabulary_has_tokens_without_text(tmp_path, capsys):
    """An artifact may have rows up to a multiple of 128 that no token of its tokenizer uses."""
    data = english_dataset()
    padded = -(-data.vocab_size // 128) * 128
    words = [f"data_path={data.path}", "prompt=the river", "tokens=8"]
    assert text_of(capsys, write_artifact(tmp_path, vocab_size=padded), *words).startswith("the river")
    wider = write_artifact(tmp_path, vocab_size=padded + 128)
    assert f"the artifact's is {padded + 128}" in refusal(sample.main, capsys, wider, *words)


# ---- the command ---------------------------------------------------------------------------------


def test_a_seed_gives_one_text(artifact, capsys):
    def text(*settings):
        return text_of(capsys, artifact, f"data_path={english_dataset().path}", "prompt=the river", *settings)

    first = text("tokens=20", "seed=5")
    assert first.startswith("the river") and len(first) > len("the river\n")
    assert text("tokens=20", "seed=5") == first != text("tokens=20", "seed=6")
    assert first.startswith(text("tokens=4", "seed=5").rstrip("\n\ufffd"))
    assert text("tokens=9", "temperature=0") == text("tokens=9", "temperature=0", "seed=8")
    by_file = text_of(
        capsys,
        artifact,
        f"tokenizer_path={english_dataset().tokenizer}",
        "prompt=the river",
        "tokens=20",
        "seed=5",
    )
    assert by_file == first


def test_held_out_texts_stand_beside_what_the_model_writes(artifact, capsys):
    import sentencepiece

    data = english_dataset()
    told = text_of(capsys, artifact, f"data_path={data.path}", "held_out=2", "tokens=12")
    processor = sentencepiece.SentencePieceProcessor(model_file=data.tokenizer)
    shown = [line.partition(":")[::2] for line in told.splitlines()]
    assert [name.strip() for name, _ in shown if name.startswith("  ")] == ["text", "model", "really"] * 2
    assert "why it makes little sense: " in told.splitlines()[-1]

    starts = np.flatnonzero(np.array(data.val) == BOS)
    begin = next(int(a) for a, b in zip(starts, [*starts[1:], len(data.val)]) if b - a >= 45)
    prompt = " ".join(processor.decode(data.val[begin : begin + 33]).split())
    rest = " ".join(processor.decode(data.val[begin + 33 : begin + 45]).split())
    assert shown[0][1].strip() == f"{prompt} ..."
    assert shown[2][1].strip() == f"... {rest}"


def test_each_held_out_text_has_draws_of_its_own(artifact, capsys, monkeypatch):
    seeds = []

    def continue_tokens(model, tokens, settings):
        seeds.append(settings.seed)
        return iter([5])

    monkeypatch.setattr(sample, "continue_tokens", continue_tokens)
    words = [f"data_path={english_dataset().path}", "held_out=3", "tokens=12", "seed=7"]
    text_of(capsys, artifact, *words)
    assert seeds == [7, 8, 9]


def test_the_command_line_knows_the_settings():
    settings = {field.name for field in dataclasses.fields(sample.Settings)}
    assert set(cli.COMMANDS["sample"].keys) == settings


@pytest.mark.parametrize(
    "words, says",
    [
        (["note=1"], "'note=1' is not a setting of sample: prompt, tokens, "),
        (["tokens=many"], "tokens=many: not of type int"),
        (["tokens=0"], "tokens=0: give a whole number from 1"),
        (["top_k=-1"], "top_k=-1: give a whole number from 0"),
        (["temperature=-1"], "temperature=-1: give a number from 0"),
        (["temperature=nan"], "temperature=nan: give a number from 0"),
        (["held_out=1", "prompt=x"], "prompt and held_out exclude each other"),
        (["held_out=999"], "not held_out=999; ask for fewer"),
    ],
)
def test_bad_settings_are_refused(artifact, capsys, words, says):
    assert says in refusal(sample.main, capsys, artifact, f"data_path={english_dataset().path}", *words)


def test_what_is_missing_is_named(artifact, capsys, tmp_path):
    assert "give data_path=DIR, or tokenizer_path=FILE" in refusal(sample.main, capsys, artifact)
    told = refusal(sample.main, capsys, artifact, f"data_path={tmp_path}")
    assert f"{tmp_path}: no manifest.json names the tokenizer; give tokenizer_path=FILE" in told
    told = refusal(sample.main, capsys, artifact, "tokenizer_path=gone.model")
    assert "gone.model: no such file; the artifact needs its tokenizer" in told
    told = refusal(sample.main, capsys, str(tmp_path / "gone"), "tokenizer_path=gone.model")
    assert "cannot read the artifact" in told
    (tmp_path / "bad").write_bytes(b"no artifact")
    told = refusal(sample.main, capsys, str(tmp_path / "bad"), "tokenizer_path=gone.model")
    assert f"{tmp_path}/bad: artifact: none of the codecs" in told


def test_a_tokenizer_that_is_not_the_artifacts_is_refused(capsys, tmp_path, data):
    artifact = write_artifact(tmp_path)
    (data / "tokenizer.model").unlink()
    told = refusal(sample.main, capsys, artifact, f"data_path={data}")
    wanted = json.loads((data / "manifest.json").read_text())["tokenizer"]["sha256"]
    assert f"{data}/tokenizer.model: no such file" in told and f"with sha256 {wanted[:12]}" in told

    other = train_tokenizer(data / "tokenizer.model", ["some other words"] * 9, 280)
    told = refusal(sample.main, capsys, artifact, f"data_path={data}")
    assert f"{data}/tokenizer.model: not the artifact's tokenizer (sha256 " in told
    told = refusal(sample.main, capsys, artifact, f"tokenizer_path={other}")
    assert "a vocabulary of 2" in told and f"the artifact's is {english_dataset().vocab_size}" in told


def test_the_log_beside_an_artifact_names_its_tokenizer(capsys, tmp_path):
    artifact = write_artifact(tmp_path)
    rule = "=" * 100
    lines = [
        "import torch",
        rule,
        "Running Python 3.11",
        rule,
        "data path:x tokenizer_sha256:0123456789abcdef",
    ]
    (tmp_path / "run.txt").write_text("\n".join(lines) + "\n")
    data = english_dataset()
    told = refusal(sample.main, capsys, artifact, f"data_path={data.path}")
    assert "the artifact's log one of 0123456789ab; give data_path=DIR" in told
    told = refusal(sample.main, capsys, artifact, f"tokenizer_path={data.tokenizer}")
    assert "not the artifact's tokenizer (sha256 " in told and "not 0123456789ab)" in told
