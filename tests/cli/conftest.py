"""For the tests of run.sh: a copy of its files with stand-ins, new for each test."""

import pytest

from tests.cli.run_sh_tree import Tree


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)
