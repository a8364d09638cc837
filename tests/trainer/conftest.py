"""For the tests of the trainer: a run that nothing disturbs, made once."""

from types import SimpleNamespace

import pytest

import train_gpt as t
from tests.stress import kill_runs
from tests.trainer import fault_cases


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Return the folder of a run that nothing disturbs, and its final state."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert t.main(fault_cases.args(folder)) == 0
    return SimpleNamespace(folder=folder, state=kill_runs.final_state(folder, step=fault_cases.STEPS))
