"""A repository with one good record, and copies of it for tests that change things."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.ledger.record_helpers import MARKERS, NAME, TRACK, make


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Make one good record in a repository of its own. Tests that change things work on a copy."""
    root = tmp_path_factory.mktemp("pristine")
    (root / "records").mkdir()
    (root / "requirements.txt").write_text("torch==2.13.0\nnumpy==2.2.6\nsentencepiece==0.2.3\n")
    (root / "README.md").write_text(MARKERS)
    (root / "records" / "README.md").write_text(MARKERS)
    make(root)
    return root


@pytest.fixture
def repo(pristine, tmp_path) -> Path:
    shutil.copytree(pristine, tmp_path / "repo")
    return tmp_path / "repo"


@pytest.fixture
def folder(repo) -> Path:
    return repo / "records" / TRACK / NAME
