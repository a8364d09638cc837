"""Fixtures of the tests of data/. No network, no GPU; the tokenizer is trained on generated text."""

import shutil
from types import SimpleNamespace

import pytest

import offline
from tests.data.data_cases import make_documents, prose, text_args, write_docs

pytest.importorskip("sentencepiece")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Train a SentencePiece model of 400 pieces with the challenge's settings; its path."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(offline.train_tokenizer(make_documents(0, 80), 400))
    return path


@pytest.fixture
def files(tmp_path, model):
    """Write input files of `text`: train and val; also the folder `out` and the `args` that build it."""
    train = write_docs(tmp_path / "t.txt", make_documents(100, 40))
    val = write_docs(tmp_path / "v.txt", make_documents(200, 5))
    out = tmp_path / "out"
    args = text_args(train, val, model, out, "--name", "toy")
    return SimpleNamespace(train=train, val=val, out=out, args=args)


@pytest.fixture
def sources(tmp_path):
    """Write 120 modules of docstrings, two copies, one that is not prose and one that does not parse.

    Returns ({package: version}, files), as `offline.installed` does.
    """
    folder = tmp_path / "lib"
    folder.mkdir()
    for i in range(120):
        doctest = f"    >>> secret_doctest({i})\n    42\n"
        body = f'"""{prose(i, 80)}\n\n{doctest}"""\n\ndef f():\n    """{prose(5000 + i, 90)}"""\n'
        (folder / f"m{i:03d}.py").write_text(body)
    shutil.copy(folder / "m001.py", folder / "n1.py")
    shutil.copy(folder / "m002.py", folder / "n2.py")
    (folder / "n3.py").write_text('"""' + "xyzzy plugh quux " * 60 + '"""')
    (folder / "n4.py").write_text("def broken(:\n")
    return {"python": "3", "toy": "1"}, sorted(folder.iterdir())
