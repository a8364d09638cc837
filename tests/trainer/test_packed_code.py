"""The packed code runs as the script does, and files are written whole or not at all."""

import ast
import errno
import itertools
import lzma
import os
import subprocess
import sys

import pytest

import train_gpt as t
from tests.helpers import ROOT, pack_anew


@pytest.fixture(scope="module")
def source():
    return (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def program(tree):
    """Dump a module's syntax tree without docstrings of functions and classes and annotations of functions.

    Triton reads those of a kernel, which stay.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg) and node.annotation and "constexpr" not in ast.unparse(node.annotation):
            node.annotation = None
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def is_long_string(node):
    """Whether a syntax node is a string that can hold a program."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 1000


def unpacked(packed):
    """Return the source that a packed program holds."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    assignment = next(node for node in ast.parse(packed).body if isinstance(node, ast.Assign))
    data = next(node.value for node in ast.walk(assignment) if is_long_string(node)).encode("latin-1")
    return lzma.decompress(data, lzma.FORMAT_RAW, filters=filters).decode()


def test_packed_code_is_deterministic_and_holds_the_source(source):
    packed = pack_anew(source)
    assert packed == pack_anew(source) == t.packed_code(source)
    assert packed != pack_anew(source + "x = 1\n")
    assert len(packed) < len(source.encode()) / 2

    imports = [node for node in ast.walk(ast.parse(packed)) if isinstance(node, ast.Import)]
    assert {alias.name for node in imports for alias in node.names} == {"lzma", "linecache"}
    held = ast.parse(unpacked(packed))
    annotations = [
        node.annotation for node in ast.walk(held) if isinstance(node, ast.arg) and node.annotation
    ]
    assert {ast.unparse(annotation) for annotation in annotations} == {"tl.constexpr"}
    assert program(held) == program(ast.parse(source))


COMMENTED = '''"""The module keeps
its docstring."""
from __future__ import annotations
# a comment
x = """text  # of a string

with a blank line"""  # after it


def f(a: int = 1, *rest: dict[str, int], é: "str" = "-> b", block: constexpr = 2) -> list[  # why
    int
]:
    """Say it."""
    kept: int = a
    return [kept, rest, é, block, lambda: a]


class C:
    """Say more.

    At length.
    """

    y: str = f"{x}#"  # no comment inside


print(x, f(3, 4)[:4], C.y, C.__annotations__, __doc__)
'''


def test_bare_code_leaves_out_comments_docstrings_and_annotations_only():
    bare = t.bare_code(COMMENTED)
    assert program(ast.parse(bare)) == program(ast.parse(COMMENTED))
    assert "why" not in bare
    assert "Say" not in bare
    assert "after it" not in bare
    assert 'def f(a = 1, *rest, é = "-> b", block: constexpr = 2):\n    kept: int = a' in bare
    assert "text  # of a string\n\nwith" in bare and "keeps\nits docstring" in bare
    assert bare.count("\n\n") == 1  # the one inside the string
    assert run_python("-c", bare).stdout == run_python("-c", COMMENTED).stdout


def test_packed_kernels_have_a_source(source, tmp_path):
    """Where Triton compiles and does not interpret, it reads the text of a kernel at import."""
    pytest.importorskip("triton")
    (tmp_path / "packed.py").write_bytes(t.packed_code(source))
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    argv = [sys.executable, "packed.py", "config", "preset=cpu"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr


def run_python(*args, **options):
    """Run Python with arguments in a process of its own."""
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, **options)


PROGRAMS = {
    "simple": "print('hello')",
    "module scope": "import sys\ndef f():\n    return g()\ndef g():\n    return __name__\nprint(f())",
    "text that quotes would break": "print('é \\' \"\"\" \\\\ {x}')",
}


def test_any_bytes_can_stand_in_the_literal():
    """All short runs of what a literal could read otherwise: zeros, digits, quotes, ends of lines, ..."""
    for run in itertools.product(b'\0"\\\r\n0789x\xff', repeat=4):
        data = bytes(run) + b"\0"
        program = f'# coding: latin-1\n"""{t.long_literal(data)}"""'
        assert ast.literal_eval(program).encode("latin-1") == data


@pytest.mark.parametrize("name", PROGRAMS)
def test_packed_code_runs_any_program(name, tmp_path):
    plain = run_python("-c", PROGRAMS[name])
    (tmp_path / "packed.py").write_bytes(t.packed_code(PROGRAMS[name]))
    packed = run_python(str(tmp_path / "packed.py"))
    assert plain.returncode == packed.returncode == 0, packed.stderr
    assert packed.stdout == plain.stdout


def test_packed_trainer_is_the_same_program(source, tmp_path):
    """`config` of the packed file prints the same knobs as `config` of the source."""
    (tmp_path / "packed.py").write_bytes(t.packed_code(source))
    printed = {}
    for name, script in (("packed", tmp_path / "packed.py"), ("source", ROOT / "train_gpt.py")):
        done = run_python(str(script), "config", "preset=cpu", "seed=7", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout
    assert printed["packed"] == printed["source"] and "seed: 7" in printed["packed"]


def test_a_packed_run_logs_and_counts_its_unpacked_source(source, tmp_path):
    """Its size is that of the file that runs, and its log holds the program that was packed."""
    program = (
        "import sys, train_gpt as t\n"
        "print(len(t.packed_code(t.own_source())), t.own_source() == t.bare_code(open(sys.argv[1]).read()))"
    )
    (tmp_path / "train_gpt.py").write_bytes(t.packed_code(source))
    done = run_python("-c", program, str(ROOT / "train_gpt.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(t.packed_code(source))), "True"]
    assert t.own_source() == source


def test_write_atomic_replaces(tmp_path):
    path = tmp_path / "a.xz"
    t.write_atomic(str(path), b"old")
    t.write_atomic(str(path), b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.xz"]


def no_space(*args, **options):
    """Fail as a call does on a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


class FullFile:
    """A file on a full disk: it opens, takes half of the bytes and fails."""

    def __init__(self, path, mode):
        self.file = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        no_space()


@pytest.mark.parametrize("failing", ["write", "open", "rename"])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.xz"
    path.write_bytes(b"old")
    if failing == "rename":
        monkeypatch.setattr(t.os, "replace", no_space)
    elif failing == "open":
        monkeypatch.setattr(t, "open", no_space, raising=False)
    else:
        monkeypatch.setattr(t, "open", FullFile, raising=False)
    with pytest.raises(t.InputError) as e:
        t.write_atomic(str(path), b"new" * 100)
    message = str(e.value)
    assert str(path) in message
    assert "No space left" in message
    assert "\n" not in message
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.xz"]


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(t.InputError, match="No such file"):
        t.write_atomic(str(tmp_path / "none" / "a.xz"), b"x")
