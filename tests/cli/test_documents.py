"""README, CONTRIBUTING and docs/: the files that they name exist, and their commands are accepted."""

import ast
import importlib
import io
import re
import shlex
import tokenize
from functools import cache
from pathlib import Path

import pytest

import cli
import prepare
import train_gpt as t
from commands.words import check_knobs, read_request
from ledger import record

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("data", "records", "tests", "tools")  # with a page of their own
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / folder / "README.md" for folder in FOLDERS)]
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`([\w./-]+\.(?:py|md|json|png|sh|toml|txt))`")
PLACEHOLDER = re.compile(r"[A-Z]{3,}|^logs/")
# By commands, in no folder of the repository.
MADE = {"log.txt", "mine.py", "manifest.json", "result.json", "config.json"}
MADE |= {"modeling_bankshot.py", "tokenization_bankshot.py"}


@cache
def paths():
    """Return the paths of all files in the folders of the repository and beside them, each after a slash."""
    tops = [top for top in ROOT.iterdir() if not top.name.startswith(".")]
    inner = [path for top in tops if top.is_dir() for path in top.rglob("*")]
    return [f"/{path.relative_to(ROOT).as_posix()}" for path in [*tops, *inner] if path.is_file()]


def anchors(text):
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path, text):
    """Return the links of a document that lead to no file of the repository, or to no heading in it."""
    broken = []
    for target in LINK.findall(text):
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        if target.startswith("http"):
            continue
        if not found.exists() or (anchor and anchor not in anchors(found.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def missing_files(text):
    """Return the files in backticks that no path of the repository ends in and no command makes."""
    named = [name for name in NAMED_FILE.findall(text) if not PLACEHOLDER.search(name.replace("README", ""))]
    return [
        name
        for name in named
        if Path(name).name not in MADE
        and not any(path.endswith(f"/{name.removeprefix('./')}") for path in paths())
    ]


def commands(text):
    """Yield the ./run.sh commands of a document's bash blocks, as lists of the words after ./run.sh."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words and words[0] == "./run.sh":
                yield [re.sub(r"\$\w+", "1", word) for word in words[1:]]  # the shell's variables are numbers


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_every_fence_stands_alone(path):
    """A rewrapped fence would hide its block from all other tests here, and from readers."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "```" in line]
    wrong = [line for line in lines if not re.fullmatch(r" *```(\w+)?", line)]
    assert not wrong and len(lines) % 2 == 0


def long_lines(text):
    """Return the lines of prose over 110 columns that a break would shorten: no table, block or picture."""
    prose = re.sub(r"^ *```.*?^ *```|^<!-- \w+:start -->.*?^<!-- \w+:end -->", "", text, flags=re.M | re.S)
    return [
        line
        for line in prose.splitlines()
        if len(line) > 110 and " " in line[:110].strip() and not re.match(r" *(\||!\[|#|\[!)|    ", line)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_prose_is_wrapped(path):
    assert not long_lines(path.read_text(encoding="utf-8"))


def test_prose_that_is_not_wrapped_is_found():
    words = "word " * 23
    assert long_lines(f"- {words}\n| {words}\n```\n{words}\n```\n    {words}\n") == [f"- {words}"]


def test_the_glossary_is_sorted():
    rows = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").split("| --- |")[-1].splitlines()
    words = [row.split("|")[1].strip().lower().replace("`", "") for row in rows if row.startswith("| ")]
    assert len(words) > 80 and words == sorted(words)


def test_the_page_of_the_ledger_lists_every_verb_once():
    text = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    (verbs,) = [action.choices for action in record.parser()._actions if action.dest == "verb"]
    block = max(
        re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S), key=lambda block: block.count("record ")
    )
    listed = re.findall(r"^\./run\.sh record (\S+)", block, re.M)
    assert sorted(listed) == sorted([*verbs, *cli.MEASURED])


def programs(text):
    """Return the first words of all commands in a document's bash blocks."""
    found = set()
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
        lines = [re.sub(r"^( *[A-Z_]+=\S+)* *", "", line) for line in block.replace("\\\n", " ").splitlines()]
        found.update(line.split()[0] for line in lines if line and not line.startswith("#"))
    return found


def check_command(words, artifact):
    """Raise BadInput, SystemExit or AssertionError if a command line would be refused."""
    if words == ["--help"]:
        return
    name, rest = cli.split_command(words)
    if name == "data":
        prepare.make_parser().parse_args(rest)
    elif name == "record" and rest[0] in cli.MEASURED:
        parser = importlib.import_module(f"lab.{rest[0]}").argument_parser()
        _, knobs = parser.parse_known_args(rest[1:])
        assert all("=" in word for word in knobs), words
        check_knobs(cli.COMMANDS["train"], knobs)
    elif name == "record":
        record.parser().parse_args(rest)
    elif name == "test":
        paths = [word for word in rest if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths), words
    else:
        command = cli.COMMANDS[name]
        if command.needs_artifact:
            rest[0] = artifact
        for option in [word for word in rest if word == "--script"]:
            rest[rest.index(option) + 1] = str(ROOT / "train_gpt.py")
        check_knobs(command, read_request(name, command, rest).knobs)


@pytest.mark.parametrize("name", NAMES)
def test_links_and_files_exist(name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    assert broken_links(path, text) == []
    assert missing_files(text) == []


def test_the_front_page_stays_short_and_begins_with_commands():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.count("\n") <= 250
    assert page.index("```bash\n./run.sh") < page.index("<!-- board:start -->")


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_accepted(name, tmp_path, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    artifact = tmp_path / "x.int6.xz"
    artifact.touch()
    for words in commands((ROOT / name).read_text(encoding="utf-8")):
        try:
            check_command(list(words), str(artifact))
        except (cli.BadInput, SystemExit) as refusal:
            raise AssertionError(f"{shlex.join(words)}: {refusal}") from None


@pytest.mark.parametrize("name", NAMES)
def test_programs_are_called_where_they_are(name):
    """A shell that has not activated .venv finds none of its programs, nor a Python with the packages."""
    found = programs((ROOT / name).read_text(encoding="utf-8"))
    assert found & {"torchrun", "pip", "python", "pytest", "ruff"} == set()


FOLDER = r"(?:docs|records|tests|tools|data)"
NAMED_IN_CODE = re.compile(rf"{FOLDER}/[\w/-]+\.(?:md|py|json|png)\b(?:#([\w-]+))?")
# A tool may leave out the folder tools/.
TOOL_NAMED_IN_CODE = re.compile(r"(?<![\w/])(?:auditor|commands|lab|ledger|use)/[\w/]+\.py\b")
FOREIGN = {"data/cached_fineweb10B.py", "data/download_hf_docs_and_tokenize.py"}  # of other repositories


def missing_in_code(text):
    """Return the repository's files that comments and docstrings of a program name and that do not exist."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    prose = [token.string for token in tokens if token.type == tokenize.COMMENT or is_docstring(token)]
    missing = []
    for found in NAMED_IN_CODE.finditer("\n".join(prose)):
        path = ROOT / found[0].partition("#")[0]
        exists = path.exists() and (not found[1] or found[1] in anchors(path.read_text(encoding="utf-8")))
        if not exists and found[0] not in FOREIGN:
            missing.append(found[0])
    tools = TOOL_NAMED_IN_CODE.findall("\n".join(prose))
    return missing + [name for name in tools if not (ROOT / "tools" / name).exists()]


def is_docstring(token):
    """Return whether a token is a string in triple quotes, which only docstrings and long texts are."""
    return token.type == tokenize.STRING and token.string.startswith('"""')


PROGRAMS = [ROOT / "train_gpt.py", *(ROOT / "tools").rglob("*.py"), *(ROOT / "data").glob("*.py")]


def test_comments_and_docstrings_name_files_that_exist():
    missing = {}
    for path in PROGRAMS:
        if found := missing_in_code(path.read_text(encoding="utf-8")):
            missing[str(path.relative_to(ROOT))] = found
    assert missing == {}


def tools_listed(text):
    """Return the modules in the tables of tools/README.md. A row without a folder is in the one above."""
    listed = []
    folder = ""
    for first, second in re.findall(r"^\| (.*?) ?\| (.*?) \|", text, re.M):
        if first.endswith("/`"):
            folder = first.strip("`")
        listed += re.findall(r"`([\w/]+\.py)`", first)
        if not first or first.endswith("/`"):
            listed += [folder + name for name in re.findall(r"`(\w+\.py)`", second)]
    return listed


def test_the_page_of_the_tools_lists_every_module():
    tools = ROOT / "tools"
    modules = [path.relative_to(tools).as_posix() for path in tools.rglob("*.py") if path.stem != "__init__"]
    assert sorted(tools_listed((tools / "README.md").read_text(encoding="utf-8"))) == sorted(modules)


def test_the_trainers_docstring_names_commands_that_run():
    """Its knobs exist, and a laptop's commands have the laptop's preset: others take hours there."""
    doc = ast.get_docstring(ast.parse((ROOT / "train_gpt.py").read_text(encoding="utf-8")))
    lines = [line.split("   ")[0].split() for line in re.findall(r"python train_gpt\.py (.*)", doc)]
    assert [words[0] for words in lines] == ["train", "train", "eval", "audit", "bench"]
    for words in lines:
        check_knobs(cli.COMMANDS["train"], [word for word in words if "=" in word])
    assert "preset=cpu" in lines[1] and "preset=cpu" in lines[2]


@pytest.mark.parametrize("name", ["README.md", "docs/script.md"])
def test_sections_are_counted_right(name):
    numbers = re.findall(r"^# (\d+)\. ", (ROOT / "train_gpt.py").read_text(encoding="utf-8"), re.M)
    assert numbers == [str(i) for i in range(len(numbers))]
    said = re.findall(r"(\d+) sections", (ROOT / name).read_text(encoding="utf-8"))
    assert said == [str(len(numbers))]


def sections() -> dict[str, str]:
    """Return the text of each section of train_gpt.py, by its number."""
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    _, *parts = re.split(r"^# (\d+)\. ", source, flags=re.M)
    return dict(zip(parts[::2], parts[1::2]))


def misplaced(text: str) -> list[str]:
    """List the names that a document puts into another section than train_gpt.py defines them in."""
    wrong = []
    for name, number in re.findall(r"`(\w+)[\w.]*`,? (?:in )?section (\d+)", text):
        if not re.search(rf"^(def |class )?{name}\b", sections()[number], re.M):
            wrong.append(f"{name}, section {number}")
    return wrong


@pytest.mark.parametrize("name", ["README.md", "docs/glossary.md", "docs/test_time_training.md"])
def test_names_are_in_the_sections_that_documents_say(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not misplaced(text)
    assert misplaced(text.replace("section 19", "section 18"))


def test_the_walk_through_the_script_has_the_titles_of_its_sections():
    text = (ROOT / "docs" / "script.md").read_text(encoding="utf-8")
    titles = {number: re.match("[^:.]+", part)[0] for number, part in sections().items()}
    assert dict(re.findall(r"^(\d+)\. \*\*([^*]+)\.\*\*", text, re.M)) == titles


def test_the_checks_see_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    text = "[a](page.md#second-part) [b](page.md#third) [c](gone.md)\n## Second part\n"
    page.write_text(text)
    assert broken_links(page, text) == ["page.md#third", "gone.md"]
    assert missing_files("`tests/gone.py` `cli/test_cli.py` `pictures/gone.png`") == [
        "tests/gone.py",
        "pictures/gone.png",
    ]

    code = '"""See docs/gone.md."""\nx = "docs/also_gone.md"  # why: docs/results.md, tools/gone.py\n'
    assert missing_in_code(code) == ["docs/gone.md", "tools/gone.py"]
    assert missing_in_code("# ledger/files.py, ledger/gone.py, tools/lab/sweep.py\n") == ["ledger/gone.py"]

    block = "```bash\nNPROC=2 ./run.sh a=1 \\\n  b=2   # note\n./run.sh test && ./run.sh --help\npip x\n```\n"
    assert list(commands(block)) == [["a=1", "b=2"], ["test"], ["--help"]]
    assert programs(block.replace("pip", "A=b pip")) == {"./run.sh", "pip"}
    bad = ["evaluate", "learning_rate=1", "record difff a b", "data download --shards 3"]
    bad += ["record sweep --rowe base", "test tests/gone.py", "eval x.int6.xz stride=3"]
    artifact = tmp_path / "x.int6.xz"
    artifact.touch()
    for line in bad:
        with pytest.raises((cli.BadInput, SystemExit, AssertionError)):
            check_command(line.split(), str(artifact))


# ---------------------------------------------------------------- presets and encodings

PRESET = re.compile(r"preset=([a-z]\w*)|`((?:h100x\d|cpu_|gpt2_)\w*)`")


def unknown_presets(text):
    """Return the presets that a text names and train_gpt.py lacks."""
    return [name for found in PRESET.finditer(text) if (name := found[1] or found[2]) not in t.PRESETS]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "docs/LOG.md"])  # the log keeps old names
def test_every_preset_named_exists(name):
    assert unknown_presets((ROOT / name).read_text(encoding="utf-8")) == []


def test_an_unknown_preset_is_found():
    assert unknown_presets("`h100x1`, `h100x1_sp4` and preset=cpux") == ["h100x1_sp4", "cpux"]


def presets_with(setting):
    """Return the presets with a value, `knob=value`, or with another value than the default of a `knob`."""
    knob, equals, text = setting.partition("=")
    default = getattr(t.Config, knob)
    value = t.kinds_of_knobs()[knob].parse(text) if equals else default
    found = {name: values.get(knob, default) for name, values in t.PRESETS.items()}
    return {name for name, of_preset in found.items() if (of_preset == value) == bool(equals)}


def presets_of_row(settings):
    """Return the presets with any of the settings that a cell of a table quotes."""
    quoted = re.findall(r"`([^`]+)`", settings)
    assert quoted
    return set().union(*map(presets_with, quoted))


def test_the_tables_of_knobs_name_the_presets_where_each_is_on():
    page = (ROOT / "docs/optimizers.md").read_text(encoding="utf-8")
    _, *tables = page.split("| knob, or one of its values | on in | ")
    assert len(tables) == 2
    for table in tables:
        rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \| ", table, re.M)
        assert len(rows) > 5
        for settings, named in rows:
            assert set(re.findall(r"`(\w+)`", named)) == presets_of_row(settings), settings
            assert (named == "none") == (not presets_of_row(settings)), settings


def test_the_table_of_the_model_says_where_a_part_is_on():
    page = (ROOT / "docs/model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w ]+) \((off|on in [^)]*)\) \| [^|]* \| ([^|]*) \|$", page, re.M)
    assert len(rows) == 7
    for part, where, settings in rows:
        assert set(re.findall(r"`(\w+)`", where)) == presets_of_row(settings), part


def test_the_page_of_the_artifact_lists_the_encodings():
    page = (ROOT / "docs/artifact.md").read_text(encoding="utf-8")
    _, _, after_head = page.partition("| encoding | codes | what takes it |\n| --- | --- | --- |\n")
    table, _, _ = after_head.partition("\n\n")
    rows = dict(re.findall(r"^\| ([^|]*) \| [^|]* \| ([^|]*) \|$", table, re.M))
    listed = {encoding for row in rows for encoding in row.split(", ")}
    assert listed == set(t.ENCODINGS)
    int8 = {spec.name for spec in t.PARAM_TABLE if spec.stored_as == "int8"}
    assert set(re.findall(r"`(\w+_proj)`", rows["int8"])) == int8
