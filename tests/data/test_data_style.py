"""The style of data/: lines of at most 110 columns, functions under 80 lines, Python 3.10."""

import ast
import inspect

import messages
import prepare
import script


def test_source_style():
    for path in sorted((prepare.ROOT / "data").glob("*.py")):
        text = path.read_text()
        assert max(map(len, text.split("\n"))) <= 110, path
        for node in ast.walk(ast.parse(text, feature_version=(3, 10))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, (path, node.name)


def test_the_two_guards_of_a_console_are_the_same():
    """data/ and tools/ may import nothing of each other."""
    assert inspect.getsource(messages.guard_console) == inspect.getsource(script.guard_console)
