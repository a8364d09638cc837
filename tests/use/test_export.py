"""./run.sh export: the folder gives the trainer's logits, tokens and text; what is bad is one line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import train_gpt as t
from tests.helpers import english_dataset, noisy_model, random_tokens, temporary_folder, tiny
from tests.use.use_cases import PARTS, refusal, write_artifact
from use import export, sample
from use.artifact import Stored, read_artifact
from use.transformers_files import model_source

LIMIT = 1e-4  # of a logit; measured: 0, for both run the same functions on the same float32 weights
TRAINER_SOURCE = Path(t.__file__).read_text(encoding="utf-8")


@pytest.fixture
def blocks(monkeypatch):
    """The file of an export as a module, where transformers is an empty shell."""
    shell = ModuleType("transformers")
    outputs = ModuleType("transformers.modeling_outputs")
    outputs.CausalLMOutput = SimpleNamespace
    shell.GenerationMixin = shell.PretrainedConfig = type("Empty", (), {})
    shell.PreTrainedModel = torch.nn.Module
    monkeypatch.setitem(sys.modules, "transformers", shell)
    monkeypatch.setitem(sys.modules, "transformers.modeling_outputs", outputs)
    module = ModuleType("modeling_bankshot")
    monkeypatch.setitem(sys.modules, "modeling_bankshot", module)
    exec(compile(model_source(TRAINER_SOURCE), "modeling_bankshot.py", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("parts", PARTS)
def test_the_blocks_of_an_export_give_the_trainers_logits(blocks, parts):
    h = tiny(**PARTS[parts])
    model = noisy_model(h)
    stored = Stored("", "", h, dict(model.named_parameters()))
    exported = blocks.GPT(SimpleNamespace(**export.model_config(t, stored)))
    exported.load_state_dict(stored.tensors)
    tokens = random_tokens(h, (2, 16))
    with torch.no_grad():
        assert (exported.logits(tokens) - model.logits(tokens)).abs().max() <= LIMIT


def test_every_part_of_the_model_is_compared():
    """A new knob of the model needs a row of PARTS."""
    rows = [tiny(**knobs) for knobs in PARTS.values()]
    sizes = {"vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "rope_dims"}
    sizes |= {"rope_base", "ve_dim", "bigram_dim", "logit_softcap", "bos_id", "eval_seq_len", "eval_stride"}
    fields = {*t.STORED_KNOBS, *t.CHANGED_KNOBS} - {"ttt_form", "ttt_rank"}
    for key in fields - sizes:
        assert len({getattr(h, key) for h in rows}) > 1, key


def test_an_export_holds_no_code_that_only_trains():
    source = model_source(TRAINER_SOURCE)
    for name in ("Optimizer", "triton", "train_gpt as", "init_tensor", "torch.distributed"):
        assert name not in source
    assert "def logits(" in source and "def without_loop(" not in source


# ---- refusals ------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_leaves_nothing(capsys, tmp_path):
    artifact = write_artifact(tmp_path)
    out = tmp_path / "out"
    data = f"data_path={english_dataset().path}"
    before = sorted(tmp_path.iterdir())
    assert "usage: export.py" in refusal(export.main, capsys, artifact, data)
    assert "which tokenizer?" in refusal(export.main, capsys, artifact, "--out", str(out))
    told = refusal(export.main, capsys, artifact, "--out", str(out), "note=1")
    assert "'note' is not a setting of export: data_path, tokenizer_path are" in told
    told = refusal(export.main, capsys, artifact, "--out", str(tmp_path), data)
    assert f"{tmp_path}: exists; give another folder, or remove it" in told
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_package_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    artifact = write_artifact(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    data = f"data_path={english_dataset().path}"
    told = refusal(export.main, capsys, artifact, "--out", str(tmp_path / "new" / "out"), data)
    assert "export needs " in told and "pip install -r requirements-export.txt" in told
    assert list((tmp_path / "new").iterdir()) == []


# ---- with transformers ---------------------------------------------------------------------------

MISSING = [name for name in ("safetensors", "transformers") if importlib.util.find_spec(name) is None]
with_transformers = pytest.mark.skipif(bool(MISSING), reason=f"requirements-export.txt: no {MISSING}")


@pytest.fixture(scope="module")
def transformers():
    """The package, told to ask no network and to keep the code that it copies in a folder of the test."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_MODULES_CACHE"] = str(temporary_folder())
    import transformers

    return transformers


def exported(folder: Path, **knobs) -> SimpleNamespace:
    """Export a tiny model. Returns its artifact and the folder."""
    artifact = write_artifact(folder, **knobs)
    out = folder / "out"
    assert export.main([artifact, "--out", str(out), f"data_path={english_dataset().path}"]) == 0
    return SimpleNamespace(artifact=artifact, folder=str(out))


@with_transformers
@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
def test_transformers_gives_the_trainers_logits(transformers, tmp_path, parts):
    made = exported(tmp_path, **PARTS[parts])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(made.folder, trust_remote_code=True)
    stored = read_artifact(t, made.artifact)
    model = t.GPT(stored.h)
    model.load_state_dict(stored.tensors)
    tokens = random_tokens(stored.h, (2, 16))
    with torch.no_grad():
        answer = loaded(tokens, labels=tokens)
        assert (answer.logits - model.logits(tokens)).abs().max() <= LIMIT
        assert torch.allclose(answer.loss, model.loss(tokens[:, :-1], tokens[:, 1:]), atol=1e-5)


@with_transformers
@pytest.mark.slow
def test_transformers_writes_the_same_text(transformers, tmp_path, capsys):
    made = exported(tmp_path)
    auto = dict(trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.folder, **auto)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(made.folder, **auto)
    prompt = tokenizer("the river", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == 1
    written = loaded.generate(**prompt, max_new_tokens=24, do_sample=False)  # past eval_seq_len
    capsys.readouterr()
    words = [f"data_path={english_dataset().path}", "prompt=the river", "tokens=24", "temperature=0"]
    assert sample.main([made.artifact, *words]) == 0
    assert tokenizer.decode(written[0], skip_special_tokens=True) + "\n" == capsys.readouterr().out

    saved = tmp_path / "saved"
    tokenizer.save_pretrained(saved)
    loaded.save_pretrained(saved)
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, **auto)
    assert torch.equal(again(**prompt).logits, loaded(**prompt).logits)
    assert transformers.AutoTokenizer.from_pretrained(saved, **auto).encode("a stone") == tokenizer.encode(
        "a stone"
    )


@with_transformers
@pytest.mark.slow
def test_padding_goes_to_the_right(transformers, tmp_path):
    made = exported(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(made.folder, trust_remote_code=True)
    tokens = torch.tensor([[1, 9, 12, 1]])
    alone = loaded(tokens[:, :3]).logits
    padded = loaded(tokens, attention_mask=torch.tensor([[1, 1, 1, 0]])).logits[:, :3]
    assert torch.allclose(alone, padded, atol=1e-5)
    with pytest.raises(ValueError, match="pad on the right"):
        loaded(tokens, attention_mask=torch.tensor([[0, 1, 1, 1]]))


@with_transformers
@pytest.mark.slow
def test_the_card_has_the_figures_of_the_log(tmp_path):
    made = exported(tmp_path)
    card = Path(made.folder, "README.md").read_text()
    assert "no score is known" in card and "val_bpb" not in card
    shutil.rmtree(made.folder)

    stored = read_artifact(t, made.artifact)
    rule = "=" * 100
    score = f"final_score metric:int6_lzma_sliding val_loss:2.5 val_bpb:1.25 sha256:{stored.sha256}"
    log = tmp_path / "run.txt"
    data = english_dataset()
    manifest = json.loads(Path(data.path, "manifest.json").read_text())
    about = f"data path:x tokenizer_sha256:{manifest['tokenizer']['sha256']}"
    log.write_text("\n".join(["import torch", rule, "Running Python 3.11", rule, about, score]) + "\n")
    assert export.main([made.artifact, "--out", made.folder, f"data_path={data.path}"]) == 0
    card = Path(made.folder, "README.md").read_text()
    assert "| val_bpb | 1.25 |" in card and f"| sha256 of the artifact | {stored.sha256} |" in card
