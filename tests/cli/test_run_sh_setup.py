"""run.sh finds Python, makes .venv and installs what is missing, once."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.cli.run_sh_tree import CHECKS, ROOT, TESTS, refused


def test_too_old_python(tree):
    for name in ("python3.14", "python3.13", "python3.12", "python3.11", "python3.10"):
        shutil.copy(tree.bin / "python3", tree.bin / name)
    refused(tree.run("test", BANKSHOT_PYTHON="", FAKE_VERSION="3.9"), "3.10", "python3 is 3.9", "PYTHON=")
    assert not (tree.root / ".venv").exists()


def test_older_python_is_passed_over_for_a_fit_one(tree):
    shutil.copy(tree.bin / "python3", tree.bin / "python3.12")
    tree.tool("python3", "#!/bin/sh\necho 3.9\n")
    done = tree.run("test", BANKSHOT_PYTHON="")
    assert done.returncode == 0 and "making .venv with python3.12" in done.stderr, done.stderr


def test_venv_module_missing(tree):
    refused(
        tree.run("test", BANKSHOT_PYTHON="", VENV_MODULE_STATUS="1"),
        "python3 has no venv module",
        "python3-venv",
    )


def test_variables_of_the_shell_and_of_python_do_not_lead_elsewhere(tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    (tmp_path / "other" / "link").mkdir(parents=True)
    env = {"CDPATH": f"{tmp_path}/other:{tmp_path}", "PYTHONHOME": "/nope", "BANKSHOT_PYTHON": sys.executable}
    command = ["bash", "link/run.sh", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: ./run.sh"), done.stderr


def test_the_seconds_of_notes_go_on_after_an_install(tree):
    """A clock that begins again once the packages are there would hide where the minutes went."""
    slow = (tree.bin / "python3").read_text().replace('"-m pip") case', '"-m pip") sleep 3; case')
    tree.tool("python3", slow)
    done = tree.run("train", "data_path=d", BANKSHOT_PYTHON="")
    assert done.returncode == 0, done.stderr
    seconds = [int(found) for found in re.findall(r"^\[run\.sh (\d+)s\]", done.stderr, re.M)]
    assert seconds == sorted(seconds) and seconds[-1] >= 3 and "installed in" in done.stderr


def test_installs_once_and_again_only_when_needed(tree):
    def pip_calls():
        return sum(line.startswith("-m pip install") for line in tree.calls())

    failed = tree.run("test", BANKSHOT_PYTHON="", PIP_STATUS="1")
    refused(failed, "requirements.txt failed", "again")
    assert pip_calls() == 1 and "-m pytest" not in tree.calls()
    assert tree.run("test", BANKSHOT_PYTHON="").returncode == 0  # the half-finished install is done again
    assert pip_calls() == 2
    done = tree.run("test", BANKSHOT_PYTHON="")  # nothing to do, nothing said
    assert done.returncode == 0
    assert done.stderr == ""
    assert pip_calls() == 2
    with open(tree.root / "requirements.txt", "a") as file:
        file.write("# a new line\n")
    assert tree.run("test", BANKSHOT_PYTHON="").returncode == 0
    assert pip_calls() == 3
    assert sum(line.startswith("-m venv") for line in tree.calls()) == 1
    (tree.root / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")  # its Python went away
    assert tree.run("test", BANKSHOT_PYTHON="").returncode == 0
    assert sum(line.startswith("-m venv") for line in tree.calls()) == 2
    assert pip_calls() == 4


def test_a_symlink_to_it_works(tree, tmp_path):
    link = tmp_path / "links/bankshot"
    link.parent.mkdir()
    (tmp_path / "links/second").symlink_to("bankshot")
    link.symlink_to(os.path.relpath(tree.root / "run.sh", link.parent))
    for name in ("bankshot", "second"):
        done = tree.run("test", script=os.path.relpath(tmp_path / "links" / name, tree.root))
        assert done.returncode == 0, done.stderr


def test_an_interpreter_that_is_named_is_used_or_refused(tree):
    refused(tree.run("test", BANKSHOT_PYTHON="", PYTHON="/nope"), "PYTHON=/nope", "not a Python")
    tree.tool("old", "#!/bin/sh\necho 3.9\n")
    refused(tree.run("test", BANKSHOT_PYTHON="", PYTHON="old"), "PYTHON=old is Python 3.9")
    assert tree.calls() == []


# An interpreter that finds none of the packages.
BARE_PYTHON = """#!/bin/sh
case "$2" in *find_spec*) exit 1 ;; esac
exec "@FAKE@" "$@"
"""


def test_a_prepared_interpreter_without_packages_is_refused(tree):
    tree.tool("bare", BARE_PYTHON.replace("@FAKE@", str(tree.bin / "python3")))
    lacks = "BANKSHOT_PYTHON=bare lacks one of numpy, torch, sentencepiece; "
    refused(tree.run("config", BANKSHOT_PYTHON="bare"), f"{lacks}run bare -m pip install -r requirements.txt")
    refused(tree.run("trian", BANKSHOT_PYTHON="bare"), "unknown command 'trian'")  # which no package mends
    refused(tree.run("data", "fly", BANKSHOT_PYTHON="bare"), "unknown verb 'fly' of data")
    tree.tool("old", "#!/bin/sh\ncase $2 in *version_info*) echo 3.9 ;; *) exit 1 ;; esac\n")
    refused(tree.run("trian", BANKSHOT_PYTHON="old"), "BANKSHOT_PYTHON=old lacks")  # it cannot read cli.py
    assert tree.calls() == []


def test_a_stamped_venv_without_packages_is_filled_again(tree):
    assert tree.run("test", BANKSHOT_PYTHON="").returncode == 0
    python = tree.root / ".venv/bin/python"
    python.write_text(BARE_PYTHON.replace("@FAKE@", str(tree.bin / "python3")))
    done = tree.run("test", BANKSHOT_PYTHON="")
    assert done.returncode == 0 and "installing requirements.txt" in done.stderr
    assert sum(line.startswith("-m pip install -qq ") for line in tree.calls()) == 2


@pytest.mark.parametrize("linked", [False, True], ids=["folder", "link"])
def test_a_venv_of_somebody_elses_is_left_alone(tree, tmp_path, linked):
    venv = tree.root / ".venv"
    if linked:
        (tmp_path / "theirs").mkdir()
        venv.symlink_to(tmp_path / "theirs")
    else:
        venv.mkdir()
    (venv / "precious").touch()
    refused(tree.run("test", BANKSHOT_PYTHON=""), str(venv), "move it", "BANKSHOT_PYTHON")
    assert os.listdir(venv) == ["precious"]


def flash4_calls(tree) -> int:
    return sum("requirements-flash4.txt" in line for line in tree.calls())


@pytest.mark.parametrize("command", [("train",), ("record", "sweep")], ids=lambda command: command[0])
@pytest.mark.parametrize(
    "gpus,capability,wanted", [(1, "9.0", 1), (8, "10.0", 1), (1, "8.9", 0), (1, "N/A", 0), (0, "", 0)]
)
def test_flash4_is_installed_where_a_gpu_can_run_it(tree, gpus, capability, wanted, command):
    tree.gpus(gpus, capability)
    for run_id in "ab":  # once
        done = tree.run(*command, BANKSHOT_PYTHON="", RUN_ID=run_id)
        assert done.returncode == 0 and flash4_calls(tree) == wanted, done
    assert ("requirements-flash4" in done.stderr) == 0
    names = [line.split("/")[-1] for line in tree.calls() if line.startswith("-m pip")]
    assert names == ["requirements.txt", "requirements-flash4.txt"][: 1 + wanted]


def test_flash4_is_installed_again_when_its_file_changes(tree):
    tree.gpus(1, "9.0")
    assert tree.run("train", "run_id=a", BANKSHOT_PYTHON="").returncode == 0
    with open(tree.root / "requirements-flash4.txt", "a") as file:
        file.write("# a new line\n")
    assert tree.run("train", "run_id=b", BANKSHOT_PYTHON="").returncode == 0
    assert flash4_calls(tree) == 2


def test_training_goes_on_without_flash4(tree):
    """It is tried once, and one line says what it costs."""
    tree.gpus(1, "9.0")
    done = tree.run("train", "run_id=a", BANKSHOT_PYTHON="", FLASH4_STATUS="1")
    told = [line for line in done.stderr.splitlines() if "no FlashAttention-4" in line]
    assert done.returncode == 0
    assert len(told) == 1
    assert "attn_windows=" in told[0]
    assert "requirements-flash4.txt" in told[0]
    again = tree.run("train", "run_id=b", BANKSHOT_PYTHON="", FLASH4_STATUS="1")
    assert again.returncode == 0
    assert flash4_calls(tree) == 1
    assert "FlashAttention" not in again.stderr


@pytest.mark.parametrize("command", ["config", "test", "data", "record verify"])
def test_what_trains_nothing_wants_no_flash4(tree, command):
    tree.gpus(1, "9.0")
    assert tree.run(*command.split(), BANKSHOT_PYTHON="").returncode == 0 and flash4_calls(tree) == 0


def test_a_page_of_runs_wants_no_flash4(tree):
    tree.gpus(1, "9.0")
    tree.run("watch", BANKSHOT_PYTHON="")  # which may miss a package for pages
    assert tree.calls() and flash4_calls(tree) == 0


def test_a_prepared_interpreter_installs_nothing(tree):
    assert tree.run("test", "-k", "style").returncode == 0
    assert tree.calls() == [*CHECKS, f"{TESTS} -k style"]
    assert not (tree.root / ".venv").exists()
