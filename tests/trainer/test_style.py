"""The form of train_gpt.py and of all Python files here, which ruff does not check.

Importing the trainer has no effect, its contents list is true, its functions are small, a statement says one
thing, every knob is used.
"""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train_gpt.py"
MAX_PACKED_BYTES = 64_000  # of the source as it counts in a submission
MAX_COLUMNS = 110
MAX_PARAMETERS = 6
MAX_POSITIONAL = 5  # arguments of a call that are not given by keyword
# Operators; rows of a table; a function that passes arguments on.
VARIADIC = ("_op", ".time_phase", ".save_for_backward", "ParamSpec", "Product", "attempt")
MAX_FUNCTION = 60  # lines; Triton kernels have no limit
# Functions that may return three or more values without names, since the field knows them: q, k, v; the
# coefficients a, b, c; a shape; a key to sort by.
THREE_OR_MORE = {"qk_heads", "minimax_quintic", "neuron_shape", "repeated", "shape", "best_first", "key"}
# Annotated pairs of unlike values that need no names: numbers and their scale; products and their sums; a
# header with its end; a file with its main entry; the items of a dict; a key to sort by.
UNLIKE_PAIRS = {"to_fp8", "xxt", "read_header", "read_manifest", "times", "order"}
# Types that do not say what a value is, unlike a class of this repository or a type variable.
SAYING_LITTLE = re.compile(r"[a-z].*|Any|Callable.*|Tensor.*|Path.*|ModuleType")
# Reading a knob to check it is not using it.
NOT_USE = re.compile("load_config|check_(ranges|choices|relations)|relations_of_.*")
RANK_NAMES = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_\w+")
BANNER_RULE = re.compile(r"# -{20,}")
BANNER = re.compile(r"# (\d+)\. ([^:.]+)[:.]")
FORBIDDEN = [f"/{name}/" for name in ("work", "home")] + ["TO" + "DO"]  # in parts, so that this file has none
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.fixture(scope="module")
def source() -> str:
    if not SCRIPT.is_file():
        pytest.fail("train_gpt.py is missing at the root of the repository", pytrace=False)
    return SCRIPT.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(source) -> ast.Module:
    return ast.parse(source)


def files_of_git() -> list[Path] | None:
    """List tracked files and new ones that git does not ignore; None without git or outside a repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode != 0:
        return None
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def files_of_folders() -> list[Path]:
    """List all files outside hidden folders and those of data and logs."""
    skip = {"logs", "datasets", "tokenizers", "__pycache__"}
    paths = []
    for path in ROOT.rglob("*"):
        folders = path.relative_to(ROOT).parent.parts
        if not any(name.startswith(".") or name in skip for name in folders):
            paths.append(path)
    return paths


def repo_files() -> list[Path]:
    """List the files of the repository."""
    paths = files_of_git()
    if paths is None:
        paths = files_of_folders()
    return sorted(path for path in paths if path.is_file())


def is_kernel(node) -> bool:
    """Return whether a function is a Triton kernel."""
    return any(re.search(r"\btriton\.jit\b", ast.unparse(d)) for d in node.decorator_list)


def functions(tree) -> list:
    """List all functions of a tree, methods and inner functions included."""
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]


def named(tree, kind, name: str):
    """Return the one definition of this kind and name at the top level."""
    found = [node for node in tree.body if isinstance(node, kind) and node.name == name]
    assert len(found) == 1, f"train_gpt.py defines {name} {len(found)} times at its top level"
    return found[0]


# ---------------------------------------------------------------- import


def libraries(tree) -> list[str]:
    """List the modules that a script imports, at its top level or in a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return sorted(names - {"__future__"})


def probe(script: Path, tree, tmp_path) -> dict:
    """Import a script in a process of its own. Returns its `effects` and its `reads` of the environment."""
    program = Path(__file__).with_name("import_probe.py")
    arguments = [str(script.parent), str(script.resolve()), *libraries(tree)]
    command = [sys.executable, "-B", str(program), *arguments]
    done = subprocess.run(command, env={}, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *printed, result = done.stdout.splitlines()
    assert printed == [] and done.stderr == "", (printed, done.stderr)
    return json.loads(result)


def test_import_has_no_effect(tree, tmp_path):
    assert probe(SCRIPT, tree, tmp_path) == {"effects": [], "reads": []}


def test_the_import_probe_sees_effects(tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text(
        "import os, torch\n"
        "A = os.environ.get('SEED', '1')\nB = os.getenv('LOCAL_RANK')\nC = dict(os.environ)\n"
        "os.environ['NEW'] = '1'\ntorch.manual_seed(1)\nopen('made.txt', 'w').close()\n"
        "import socket\nsocket.socket().close()\nimport subprocess\nsubprocess.run(['true'])\n"
    )
    seen = probe(script, ast.parse(script.read_text()), tmp_path)
    assert {"SEED", "LOCAL_RANK", "all of it"} <= set(seen["reads"])
    for word in ("sets NEW", "made.txt", "socket", "subprocess.Popen", "changes rng"):
        assert any(word in effect for effect in seen["effects"]), (word, seen)


def test_no_local_import(tree):
    local = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    assert not {name.split(".")[0] for name in libraries(tree)} & local
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


def looked_up(node) -> str | None:
    """Return the upper-case name that a node looks up in a mapping: m.get(NAME), m[NAME] or NAME in m."""
    key = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        key = next(iter(node.args), None)
    elif isinstance(node, ast.Subscript):
        key = node.slice
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
        key = node.left
    is_name = isinstance(key, ast.Constant) and isinstance(key.value, str) and key.value.isupper()
    return key.value if is_name else None


def test_environment_is_read_in_main_only(tree):
    """Let `main` pass os.environ on, and others only do what is not about a run's settings.

    `init_machine` sets a default, `tell_torchrun` finds torchrun's file, `read_ranks` looks up only ranks,
    `wrong_setting` names PyTorch's own variables, `has_live_line` looks up only TERM.
    """
    allowed_names = ("main", "init_machine", "tell_torchrun", "wrong_setting", "has_live_line")
    readers = [f for f in functions(tree) if f.name in allowed_names]
    allowed = {id(node) for f in readers for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv"):
            assert id(node) in allowed, f"line {node.lineno}: os.{node.attr} outside main and init_machine"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            imported = {alias.name for alias in node.names}
            assert not {"environ", "getenv"} & imported, f"line {node.lineno}: use os.environ in main"
    assert set(map(looked_up, ast.walk(named(tree, FUNCTIONS, "has_live_line")))) <= {None, "TERM"}
    for node in ast.walk(named(tree, FUNCTIONS, "read_ranks")):
        name = looked_up(node)
        if name is not None:
            assert RANK_NAMES.fullmatch(name), f"read_ranks reads {name}: make it a Config field"


# ---------------------------------------------------------------- banners, contents


class Section(NamedTuple):
    number: int
    text: str


def banners(source: str) -> list[Section]:
    """List the sections that the banners begin, with their titles."""
    lines = source.splitlines()
    found = []
    for rule, line in zip(lines, lines[1:], strict=False):
        if BANNER_RULE.fullmatch(rule):
            match = BANNER.match(line)
            assert match, f"a banner reads `# NUMBER. Title: one sentence`, not {line!r}"
            found.append(Section(int(match[1]), match[2].strip()))
    return found


def contents(docstring: str) -> list[Section]:
    """List the numbered lines after the line `Contents`, up to the blank line that ends them."""
    lines = docstring.splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"\s*contents\b", line, re.I)]
    assert starts, "the docstring has no line that starts with Contents"
    listed = []
    for line in lines[starts[0] + 1 :]:
        match = re.match(r"\s*(\d+)\.? +(\S.*)", line)
        if match:
            listed.append(Section(int(match[1]), match[2]))
        elif listed and not line.strip():
            break
    return listed


def test_contents_equal_the_banners(source, tree):
    found = banners(source)
    listed = contents(ast.get_docstring(tree, clean=False) or "")
    numbers = [section.number for section in found]
    assert numbers == list(range(len(found))) and len(found) >= 10, found
    assert [section.number for section in listed] == numbers, (listed, found)
    for (number, title), (_, text) in zip(found, listed):
        listed_title = re.split(r" {2,}|:", text)[0].strip()
        shown = f"section {number}: the banner says {title!r}, the contents {listed_title!r}"
        assert listed_title == title, shown


# ---------------------------------------------------------------- sizes


def test_packed_size(source):
    """The packed script counts in every submission; comments and docstrings are left out of it."""
    import train_gpt

    packed = len(train_gpt.packed_code(source))
    assert packed <= MAX_PACKED_BYTES, f"{packed} packed bytes"


def test_lines(source):
    lines = source.splitlines()
    wide = [(i, len(line)) for i, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
    assert not wide, f"(line, columns) over {MAX_COLUMNS}: {wide}"
    separators = [i for i, line in enumerate(lines, 1) if line.strip() == "=" * 100]
    assert not separators, f"lines {separators} are the log's separator, and every log begins with the source"


def test_function_lengths(tree):
    long = []
    for f in functions(tree):
        lines = f.end_lineno - f.lineno + 1
        if not is_kernel(f) and lines > MAX_FUNCTION:
            long.append((f.name, lines))
    assert not long, f"(function, lines) too long: {long}"


def test_parameter_counts(tree):
    many = []
    for f in functions(tree):
        parameters = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        parameters += filter(None, [f.args.vararg, f.args.kwarg])
        names = [parameter.arg for parameter in parameters if parameter.arg not in ("self", "cls")]
        if not is_kernel(f) and len(names) > MAX_PARAMETERS:
            many.append((f.name, names))
    assert not many, f"more than {MAX_PARAMETERS} parameters: {many}"


def test_main_is_the_last_statement(tree):
    last = tree.body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    assert len(last.body) == 1


# ---------------------------------------------------------------- sentences


def is_product_with_flag(node) -> bool:
    """Return whether a node is x * bool(y), a name times words, or a list times a comparison.

    One character times a name is a width, not a flag.
    """
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return False
    sides = (node.left, node.right)
    a_list = any(isinstance(side, (ast.List, ast.Tuple)) for side in sides)
    a_test = any(isinstance(side, (ast.Compare, ast.BoolOp)) for side in sides)
    a_bool = any(isinstance(side, ast.Call) and getattr(side.func, "id", "") == "bool" for side in sides)
    texts = [side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)]
    has_words = any(len(text) > 1 for text in texts)
    a_name = any(isinstance(side, (ast.Name, ast.Attribute)) for side in sides)
    return a_bool or (has_words and a_name) or (a_list and a_test)


def has_many_positional(node) -> bool:
    """Return whether a node is a call with more than MAX_POSITIONAL arguments without keywords."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func).endswith(VARIADIC):
        return False
    return len([a for a in node.args if not isinstance(a, ast.Starred)]) > MAX_POSITIONAL


def is_chained_conditional(node) -> bool:
    """Return whether a node is a conditional expression inside another."""
    if not isinstance(node, ast.IfExp):
        return False
    return any(isinstance(part, ast.IfExp) for part in (node.body, node.orelse, node.test))


def golfed(tree) -> list:
    """Return (line, rule) of every statement that says several things at once, or hides a flag in one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                found.append((node.lineno, "an assignment of several values"))
            if isinstance(node.value, ast.Lambda):
                found.append((node.lineno, "a lambda with a name"))
        if is_chained_conditional(node):
            found.append((node.lineno, "a chained conditional expression"))
        if is_product_with_flag(node):
            found.append((node.lineno, "a product with a flag"))
        if has_many_positional(node):
            found.append((node.lineno, "a call with many arguments and no keywords"))
    return found


def test_a_statement_says_one_thing(tree):
    kernels = [f for f in functions(tree) if is_kernel(f)]
    calls_in_kernels = {n.lineno for f in kernels for n in ast.walk(f) if isinstance(n, ast.Call)}
    bad = [(line, rule) for line, rule in golfed(tree) if line not in calls_in_kernels]
    assert not bad, bad


def test_the_sentence_check_sees_each():
    texts = {
        "an assignment of several values": "a, b = 1, f(x)",
        "a lambda with a name": "f = lambda x: x",
        "a chained conditional expression": "x = 1 if a else 2 if b else 3",
        "a product with a flag": "x = [1] * bool(y)",
        "a call with many arguments and no keywords": "f(1, 2, 3, 4, 5, 6)",
    }
    for rule, text in texts.items():
        assert [r for _, r in golfed(ast.parse(text))] == [rule]
    for text in ("x = [1] * (y > 2)", "x = y * ' more'", "x = 'more ' * y.z"):
        assert golfed(ast.parse(text))
    assert not golfed(ast.parse("a, b = f(x)\nw = wd * (U >= 0)\nx = 1 if a else 2\nf(1, 2, 3, 4, 5, k=6)"))
    assert not golfed(ast.parse("x = ' ' * width"))


def anonymous_tuples(tree) -> list:
    """Return (function, line) of every returned tuple of three or more values without names."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    autograd = [c for c in classes if any("autograd.Function" in ast.unparse(base) for base in c.bases)]
    gradients = {id(node) for c in autograd for node in ast.walk(c)}
    found = []
    for f in functions(tree):
        if is_kernel(f) or id(f) in gradients or f.name in THREE_OR_MORE:
            continue
        returned = [node.value for node in ast.walk(f) if isinstance(node, ast.Return)]
        for value in returned:
            if isinstance(value, ast.Tuple) and len(value.elts) > 2:
                found.append((f.name, value.lineno))
    return found


def test_three_values_have_names(tree):
    assert not anonymous_tuples(tree)
    assert anonymous_tuples(ast.parse("def f(): return 1, 2, 3")) == [("f", 1)]


def annotations(tree) -> list:
    """Return (name, annotation) of every result, parameter and variable that has one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            found.append((node.name, node.returns))
        elif isinstance(node, ast.arg):
            found.append((node.arg, node.annotation))
        elif isinstance(node, ast.AnnAssign):
            found.append((ast.unparse(node.target), node.annotation))
    return [(name, annotation) for name, annotation in found if annotation is not None]


def subscripted(node, *names: str) -> bool:
    """Return whether a node is NAME[...] with one of these names."""
    return isinstance(node, ast.Subscript) and ast.unparse(node.value) in names


def is_unlike_tuple(node) -> bool:
    """Return whether a node is tuple[...] with unlike parts, some of which do not say what they are."""
    if not subscripted(node, "tuple") or not isinstance(node.slice, ast.Tuple):
        return False
    parts = [ast.unparse(part) for part in node.slice.elts]
    return len(set(parts)) > 1 and "..." not in parts and any(map(SAYING_LITTLE.fullmatch, parts))


def keys_in(annotation) -> list:
    """Return the nodes that are keys of a dict or members of a set, which are looked up whole."""
    dicts = [n.slice.elts[0] for n in ast.walk(annotation) if subscripted(n, "dict")]
    return dicts + [n.slice for n in ast.walk(annotation) if subscripted(n, "set")]


def unlike_tuples(tree) -> list:
    """Return (name, line) of every annotation with a tuple of unlike values without names."""
    found = []
    for name, annotation in annotations(tree):
        keys = keys_in(annotation)
        unlike = [node for node in ast.walk(annotation) if is_unlike_tuple(node) and node not in keys]
        if unlike and name not in UNLIKE_PAIRS:
            found.append((name, annotation.lineno))
    return found


def test_the_tuple_check_sees_unlike_values():
    for annotation in ("tuple[str, int]", "list[tuple[str, list[str]]]", "tuple[Row, float] | None"):
        assert unlike_tuples(ast.parse(f"def f() -> {annotation}: pass")) == [("f", 1)], annotation
        assert unlike_tuples(ast.parse(f"def f(\n    x: {annotation}\n): pass")) == [("x", 2)], annotation
        assert unlike_tuples(ast.parse(f"x: {annotation}")) == [("x", 1)], annotation
    for annotation in ("tuple[str, ...]", "tuple[int, int]", "tuple[Item, Result]", "set[tuple[str, int]]"):
        assert not unlike_tuples(ast.parse(f"x: {annotation}")), annotation


def test_docstrings(tree):
    """Every public function and class says what it does, in a first line that is a sentence."""
    missing = []
    unfinished = []
    for owner in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
        for node in owner.body:
            if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_"):
                continue
            inside_autograd = isinstance(owner, ast.ClassDef) and node.name in ("forward", "backward")
            is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
            text = ast.get_docstring(node)
            if text is None and not inside_autograd and not is_property and node.name != "Config":
                missing.append(node.name)
            elif text and not re.search(r"[.:]$|[.:] ", text.splitlines()[0]):
                unfinished.append(node.name)
    assert not missing, missing
    assert not unfinished, unfinished


def documented_methods(trees) -> dict[str, set[str]]:
    """Return each class's documented methods, by its name: an override of one needs no docstring."""
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        node.name: {f.name for f in node.body if isinstance(f, FUNCTIONS) and ast.get_docstring(f)}
        for node in classes
    }


def undocumented(tree, documented) -> list[str]:
    """Return the public classes, functions and methods without a docstring; properties may have none."""
    missing = []
    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        bases = [ast.unparse(base) for base in getattr(owner, "bases", [])]
        inherited = set().union(*(documented.get(base, set()) for base in bases))
        for node in owner.body:
            if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_"):
                continue
            is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
            if ast.get_docstring(node) is None and not is_property and node.name not in inherited:
                missing.append(node.name)
    return missing


def test_docstrings_of_tools_and_data():
    trees = program_trees()
    del trees["train_gpt.py"]  # test_docstrings is stricter
    documented = documented_methods(trees.values())
    found = {name: missing for name, tree in trees.items() if (missing := undocumented(tree, documented))}
    assert not found, found

    plain = (
        "class A:\n    'A.'\n    def f(self):\n        'F.'\n\nclass B(A):\n    'B.'\n    def f(self): 1\n"
    )
    tree = ast.parse(plain + "    def g(self): 1\n\ndef h(): 1\n")
    assert undocumented(tree, documented_methods([tree])) == ["h", "g"]


# ---------------------------------------------------------------- knobs


def attributes(tree) -> set[str]:
    """Return the names of all attributes in a tree."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def names_in_tables(tree) -> set[str]:
    """Return the strings of the tables that name knobs."""
    names = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id in ("PARAM_TABLE", "DECAYS") for target in targets):
            constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            names |= {value for value in constants if isinstance(value, str)}
    return names


def unread_fields(tree) -> list[str]:
    """List the Config fields that nothing outside Config reads, directly or through a property of Config."""
    config = named(tree, ast.ClassDef, "Config")
    assigned = [n.target for n in config.body if isinstance(n, ast.AnnAssign)]
    fields = [target.id for target in assigned if isinstance(target, ast.Name)]
    properties = {n.name: attributes(n) for n in config.body if isinstance(n, FUNCTIONS)}

    no_use = [config, *(f for f in functions(tree) if NOT_USE.fullmatch(f.name))]
    inside = {id(node) for part in no_use for node in ast.walk(part)}
    read = names_in_tables(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in inside:
            read.add(node.attr)

    while True:
        more = {attr for name in read & properties.keys() for attr in properties[name]} - read
        if not more:
            return [name for name in fields if name not in read]
        read |= more


def test_every_knob_is_used(tree):
    assert not unread_fields(tree), "Config fields that nothing reads"


def test_the_knob_check_sees_an_unused_one():
    text = """
class Config:
    used: int = 1
    through: int = 2
    table: float = 3
    dead: int = 4
    checked: int = 5
    related: int = 6
    @property
    def size(self): return self.through + self.dead_too
    @property
    def unused_size(self): return self.dead
PARAM_TABLE = {"bank": "table"}
def check_ranges(h): return h.checked
def relations_of_sizes(h): yield h.related
def f(h): return h.used + h.size, "dead"
"""
    assert unread_fields(ast.parse(text)) == ["dead", "checked", "related"]


# ---------------------------------------------------------------- every file of the tree


def needs_python_312(token, quote: str) -> bool:
    """Return whether a token inside an f-string with these quotes is one that only Python 3.12 accepts."""
    if quote in token.string or "\\" in token.string or token.type == tokenize.COMMENT:
        return True
    return len(quote) == 1 and token.type == tokenize.NL


def newer_fstrings(text: str) -> list[int]:
    """List lines whose f-strings need Python 3.12. Below 3.12 the parser itself refuses such a file."""
    if sys.version_info < (3, 12):
        return []
    bad = set()
    quotes = []  # of the f-strings around a token
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_expression = token.type not in (tokenize.FSTRING_MIDDLE, tokenize.FSTRING_END)
        if is_expression and any(needs_python_312(token, quote) for quote in quotes):
            bad.add(token.start[0])
        if token.type == tokenize.FSTRING_START:
            quotes.append(token.string.lstrip("fFrRbB"))
        elif token.type == tokenize.FSTRING_END:
            quotes.pop()
    return sorted(bad)


def python_files() -> list[Path]:
    return [path for path in repo_files() if path.suffix == ".py"]


def program_trees() -> dict[str, ast.Module]:
    """Return the trees of the programs, by name: the trainer, the tools, and what makes data."""
    others = [path for path in python_files() if path.relative_to(ROOT).parts[0] in ("tools", "data")]
    paths = [SCRIPT, *others]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def test_long_calls_have_keywords():
    found = {}
    for name, tree in program_trees().items():
        kernels = {id(node) for f in functions(tree) if is_kernel(f) for node in ast.walk(f)}
        calls = [node for node in ast.walk(tree) if has_many_positional(node) and id(node) not in kernels]
        if calls:
            found[name] = [call.lineno for call in calls]
    assert not found, f"lines of calls with more than {MAX_POSITIONAL} arguments by position: {found}"


def test_unlike_values_have_names():
    found = {}
    for name, tree in program_trees().items():
        if unlike := unlike_tuples(tree) + anonymous_tuples(tree):
            found[name] = unlike
    assert not found, f"(name, line) of tuples to make a NamedTuple: {found}"


def test_python_310_grammar():
    path_of = {path.read_text(encoding="utf-8"): path for path in python_files()}  # records share scripts
    assert path_of
    for text, path in path_of.items():
        ast.parse(text, str(path), feature_version=(3, 10))
        assert not newer_fstrings(text), f"{path}: lines {newer_fstrings(text)} need Python 3.12"


def test_the_fstring_check_sees_newer_ones():
    for text in (
        'x = f"{a["b"]}"\n',
        "x = f'{a!r:{w['k']}}'\n",
        'x = f"{chr(10).join(["\\n"])}"\n',
        'x = f"{\na}"\n',
    ):
        with pytest.raises((SyntaxError, AssertionError)):
            ast.parse(text, feature_version=(3, 10))
            assert not newer_fstrings(text)
    for text in (
        "x = f\"{a['b']}\"\n",
        'x = f"""{a["b"]}"""\n',
        'x = f"\\n{a}"\n',
        'x = (f"{a}"\n     f"{b}")\n',
    ):
        ast.parse(text, feature_version=(3, 10))
        assert not newer_fstrings(text), text


def names_used(definition) -> set[str]:
    """Return the names that a function or class reads, without those in annotations, which never run."""
    used = Counter(node.id for node in ast.walk(definition) if isinstance(node, ast.Name))
    for node in ast.walk(definition):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                used -= Counter(part.id for part in ast.walk(annotation) if isinstance(part, ast.Name))
    return set(used)


def test_later_sections_read_from_top_to_bottom(tree, source):
    """From section 10 on, a function uses what stands above it. Only the codecs read what they compress."""
    first = source[: source.index("\n# 10. ")].count("\n")
    defined = [node for node in tree.body if isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    line = {node.name: node.lineno for node in defined if node.name != "_"}
    backwards = {
        (node.name, name)
        for node in defined
        if node.lineno > first
        for name in names_used(node)
        if line.get(name, 0) > node.lineno
    }
    assert backwards <= {("open_artifact", "codec_of")}


def test_python_310_compiles_it():
    python = shutil.which("python3.10")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip("no python3.10 here")
    code = "import sys\nfor p in sys.stdin.read().split('\\0'): compile(open(p, 'rb').read(), p, 'exec')"
    names = "\0".join(map(str, python_files()))
    done = subprocess.run([python, "-c", code], input=names, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_machine_paths_and_no_notes_to_self():
    found = []
    for path in repo_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for i, line in enumerate(lines, 1):
            found += [f"{path.relative_to(ROOT)}:{i}: {word}" for word in FORBIDDEN if word in line]
    assert not found, found[:20]
