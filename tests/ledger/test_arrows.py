"""Who may import whom: cli -> commands -> ledger, lab, use; lab, use -> ledger, trainer; and no circle.

The imports are read from the text of the files, so that one inside a function counts, too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A package or module of the repository, and those that nothing in it may import.
AUDITOR = {"audit", "auditor"}
SHARED = {"script", "older_scripts"}
FORBIDDEN = {
    "commands": {"torch", "cli", "train_gpt"} | AUDITOR,
    "ledger": {"torch", "lab", "use", "cli", "commands", "train_gpt"} | AUDITOR,
    "lab": {"cli", "commands", "use"} | AUDITOR,
    "use": {"cli", "commands", "lab"} | AUDITOR,
    **dict.fromkeys(SHARED, {"ledger", "lab", "use", "cli", "commands", "train_gpt", "torch"} | AUDITOR),
    **dict.fromkeys(AUDITOR, {"cli", "commands"}),
}


def python_files(root: Path) -> dict[str, Path]:
    """Return {dotted name: path} of tools/**, data/** and train_gpt.py."""
    found = {}
    for folder, prefix in (("tools", ()), ("data", ("data",))):
        for path in sorted((root / folder).rglob("*.py")):
            parts = [*prefix, *path.relative_to(root / folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = path
    found["train_gpt"] = root / "train_gpt.py"
    return found


def imported(name: str, path: Path) -> set[str]:
    """Return the dotted names that a module imports anywhere; relative imports are made absolute."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def local_imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """Return {module: modules of the repository that it imports}."""
    beside = {name.rpartition(".")[2]: name for name in files if name.startswith("data.")}
    graph = {}
    for name, path in files.items():
        targets = imported(name, path)
        if name.startswith("data."):  # these run as files, so that their own folder is on the path
            targets = {beside.get(target, target) for target in targets}
        graph[name] = (targets & set(files)) - {name}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle in order, or an empty list."""
    done: set[str] = set()

    def search(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return trail[trail.index(name) :]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if found := search(target, [*trail, name]):
                return found
        done.add(name)
        return []

    for name in graph:
        if found := search(name, []):
            return found
    return []


def crossing(name: str, tops: set[str], files: dict[str, Path]) -> set[str]:
    """Return the modules of tools/ that one of data/ imports, or the other way round."""
    of_data = {file.removeprefix("data.") for file in files if file.startswith("data.")}
    of_tools = {file.split(".")[0] for file in files if not file.startswith("data.")}
    return tops & (of_tools if name.startswith("data.") else of_data - of_tools)


def violations(root: Path) -> list[str]:
    """Return every arrow that must not be there, and the circle if there is one."""
    files = python_files(root)
    graph = local_imports(files)
    found = []
    for name, path in files.items():
        names = imported(name, path)
        tops = {target.split(".")[0] for target in names}
        found += [f"{name} imports {top}" for top in sorted(tops & FORBIDDEN.get(name.split(".")[0], set()))]
        if "cli" in tops:
            found.append(f"{name} imports cli, which nothing may")
        found += [f"{name} imports {other}" for other in sorted(crossing(name, tops, files))]
    found += [f"train_gpt imports {target}" for target in sorted(graph["train_gpt"])]
    if modules := circle({name: targets - {"train_gpt"} for name, targets in graph.items()}):
        found.append(f"circle: {' -> '.join(modules)}")
    return found


def write_tree(root: Path, **sources: str) -> Path:
    """Write a repository of empty modules, some of them with these sources (`__` stands for a folder)."""
    modules = [
        "../data/messages",
        "script",
        "cli",
        "audit",
        "ledger__record",
        "ledger__files",
        "lab__bench",
        "lab__sweep",
    ]
    texts = dict.fromkeys(modules, "") | sources
    root.mkdir(exist_ok=True)
    (root / "train_gpt.py").write_text(texts.pop("train_gpt", "import torch\n"), encoding="utf-8")
    for name, text in texts.items():
        path = (root / "tools" / (name.replace("__", "/") + ".py")).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_the_arrows_of_the_repository():
    assert violations(ROOT) == []


def test_the_checker_reads_the_modules_that_matter():
    files = python_files(ROOT)
    assert {"script", "audit", "ledger.record", "lab.sweep", "train_gpt"} <= set(files)
    graph = local_imports(files)
    assert {"ledger.make.sweep_table", "script"} <= graph["lab.sweep"] | {"script"}
    assert "ledger.files" in graph["ledger.record"]


def test_allowed_arrows_pass(tmp_path):
    root = write_tree(
        tmp_path,
        cli="import audit\nfrom lab import bench\nfrom ledger import record\n",
        lab__sweep="import torch\nimport train_gpt\nfrom ledger.files import read_text\n",
        ledger__record="from ledger import files\nfrom script import BadInput\n",
    )
    assert violations(root) == []


@pytest.mark.parametrize(
    "module, source, says",
    [
        ("ledger__record", "def f():\n    from lab import sweep\n", "ledger.record imports lab"),
        ("ledger__record", "import torch.nn\n", "ledger.record imports torch"),
        ("ledger__record", "from audit import judge\n", "ledger.record imports audit"),
        ("lab__bench", "import audit\n", "lab.bench imports audit"),
        ("use__sample", "from lab import bench\n", "use.sample imports lab"),
        ("lab__bench", "from cli import main\n", "lab.bench imports cli"),
        ("use__sample", "from commands import datasets\n", "use.sample imports commands"),
        ("commands__bench", "import torch\n", "commands.bench imports torch"),
        ("audit", "import cli\n", "audit imports cli, which nothing may"),
        ("script", "import ledger.files\n", "script imports ledger"),
        ("train_gpt", "from script import ROOT\n", "train_gpt imports script"),
        ("audit", "from messages import say\n", "audit imports messages"),
        ("../data/messages", "from script import ROOT\n", "data.messages imports script"),
        ("lab__bench", "from . import sweep\nfrom ..ledger import files\n", ""),
    ],
)
def test_a_planted_violation_is_named(tmp_path, module, source, says):
    root = write_tree(tmp_path, **{module: source})
    found = violations(root)
    assert (says in found) if says else found == []


def test_a_planted_circle_is_named(tmp_path):
    root = write_tree(
        tmp_path,
        lab__bench="from lab import sweep\n",
        lab__sweep="def f():\n    from .bench import g\n",
    )
    assert violations(root) == ["circle: lab.bench -> lab.sweep"]


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it raises ModuleNotFoundError
from ledger import record
sys.exit(record.main(sys.argv[1:]))
"""


def test_the_ledger_works_without_torch():
    """Every module of the ledger is imported, and a folder of every kind without a probe is proved."""
    folders = [*(ROOT / "records" / "sweeps").iterdir(), *(ROOT / "records" / "directions").iterdir()]
    argv = [sys.executable, "-c", WITHOUT_TORCH, "verify", "--quiet", *map(str, sorted(folders)[-2:])]
    done = subprocess.run(
        argv, env={"PYTHONPATH": str(ROOT / "tools")}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "0 fail" in done.stdout, done.stdout + done.stderr


def test_record_help_names_the_verbs_of_the_lab(capsys):
    from ledger import record

    with pytest.raises(SystemExit):
        record.main(["--help"])
    told = capsys.readouterr().out
    assert all(f"\n    {verb} " in told for verb in ("directions", "wire", "sweep", "new", "verify"))
