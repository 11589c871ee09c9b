"""README.md and docs: Python blocks run, names and links exist, quoted numbers equal the stored numbers."""

import ast
import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
SPEC = ROOT / "docs/spec.md"
BLOCK = re.compile(r"(<!-- needs a GPU -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """(first line number, source) of each Python block that runs on a CPU."""
    matches = [m for m in BLOCK.finditer(text) if not m[1]]
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in matches]


def run(source: str, names: dict, where: str, line: int) -> None:
    """Run a block in the namespace `names`: as a doctest if it has prompts, otherwise as statements."""
    if ">>>" not in source:
        exec(compile("\n" * (line - 1) + source, where, "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(source, {}, where, where, line - 1)
    test.globs = names
    output = []
    doctest.DocTestRunner(verbose=False).run(test, out=output.append, clear_globs=False)
    assert not output, "".join(output)


def test_the_extraction():
    text = "a\n```python\nx = 1\n```\n<!-- needs a GPU -->\n```python\nx = 1 / 0\n```\n```bash\nls\n```\n"
    assert blocks(text) == [(3, "x = 1\n")]
    names = {}
    run("x = 1\n", names, "here", 1)
    run(">>> x + 1\n2\n", names, "here", 3)
    with pytest.raises(AssertionError, match='File "here", line 5'):
        run(">>> x\n2\n", names, "here", 5)


def marks(path: Path) -> list:
    """Pages that load a model are slow, except README.md."""
    if not any(
        "load(" in source or "from_pretrained(" in source
        for _, source in blocks(path.read_text(encoding="utf-8"))
    ):
        return []
    return [pytest.mark.real_model] + [pytest.mark.slow] * (path.name != "README.md")


@pytest.mark.parametrize("path", [pytest.param(p, id=p.name, marks=marks(p)) for p in FILES])
def test_python_blocks_run(path, request, tmp_path, monkeypatch):
    """Run the blocks of a file in order, in one namespace, in a writable folder."""
    if marks(path):
        model, tokenizer = request.getfixturevalue("smollm2")
        # The models that pages name lie on a hub. A small one stands in for them.
        for name, found in (("AutoModelForCausalLM", model), ("AutoTokenizer", tokenizer)):
            monkeypatch.setattr(f"transformers.{name}.from_pretrained", lambda *_, found=found, **__: found)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, source in blocks(path.read_text(encoding="utf-8")):
        # Enough to test that the block runs.
        few = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", source).replace(" * 100", " * 20")
        run(few, names, str(path), line)


@pytest.mark.parametrize("path", FILES + sorted(ROOT.glob("docs/reference/*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    headings = [re.sub(r"[^\w -]", "", h.lower()) for h in re.findall(r"^#+ (.*)", text, re.MULTILINE)]
    anchors = [h.replace(" ", "-") for h in headings]
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" not in target:
            assert (path.parent / file).exists(), target
            assert file or anchor in anchors, target


def test_the_functions_that_the_specification_names_exist():
    modules = {p.stem for p in (ROOT / "fade_ref").glob("*.py")}
    named = re.findall(r"`(\w+)\.([A-Za-z_][\w.]*)`", SPEC.read_text(encoding="utf-8"))
    named = [(module, name) for module, name in named if module in modules]
    assert len(named) > 50
    for module, name in named:
        thing = importlib.import_module(f"fade_ref.{module}")
        for part in name.split("."):
            assert hasattr(thing, part), f"{module}.{name}"
            thing = getattr(thing, part)


def test_the_numbers_under_the_figures_are_the_stored_ones():
    location = importlib.util.spec_from_file_location("figures", ROOT / "docs/figures.py")
    figures = importlib.util.module_from_spec(location)
    location.loader.exec_module(figures)
    text = SPEC.read_text(encoding="utf-8")
    for name in figures.FIGURES:
        assert figures.quoted(text, name) == text, f"python docs/figures.py --redraw --only {name}"


GUIDE, SERVER = ROOT / "docs/guide.md", ROOT / "docs/server.md"
#: Names of callables whose first argument is a message to the user.
RAISED = re.compile(r".*(Error|Warning)$|warn$|refusal$")


def messages(source: str) -> list[list[str]]:
    """The literal pieces of each message in the errors and warnings of a module, in order."""
    pieces = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if RAISED.match(name) and isinstance(node.args[0], (ast.Constant, ast.JoinedStr)):
            parts = getattr(node.args[0], "values", [node.args[0]])
            texts = [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
            pieces.append([text.strip() for text in texts if text.strip(" :;,=()[]")])
    return [message for message in pieces if message]


def test_how_messages_are_found():
    source = 'raise ValueError(f"a {x}: b")\nwarnings.warn("c")\nraise E(y)\nraise ValueError(str(e))\nf("d")'
    assert messages(source) == [["a", ": b"], ["c"]]


def explained(pieces: list[str], entries: list[str]) -> bool:
    """Whether an entry contains all pieces in this order, with only `...` between them."""
    pattern = r"[^|`]*?\.\.\.[^|`]*?".join(map(re.escape, pieces))
    return any(re.search(pattern, entry) for entry in entries)


def test_every_message_has_its_cure_in_the_guide():
    """The guide explains only the form of kernel messages, since users do not call kernels directly.

    The messages of the server have a page of their own. Those of `measure` say how to cure themselves.
    """
    lines = [line for page in (GUIDE, SERVER) for line in page.read_text(encoding="utf-8").splitlines()]
    rows = [line.split(" | ") for line in lines if " | " in line]
    entries = [row[0] for row in rows if len(row) == 2 and len(row[1]) > 10]
    files = [*(ROOT / "fade_fast").rglob("*.py"), ROOT / "fade_ref/config.py", ROOT / "fade_ref/tiers.py"]
    raised = [
        (path.relative_to(ROOT), pieces)
        for path in files
        if path.parent.name not in ("kernels", "measure") and path.name != "deprecated.py"
        for pieces in messages(path.read_text(encoding="utf-8"))
    ]
    assert len(raised) > 80
    missing = [f"{path}: {' ... '.join(pieces)}" for path, pieces in raised if not explained(pieces, entries)]
    assert not missing, "docs/guide.md and docs/server.md do not say how to cure:\n" + "\n".join(missing)


def test_the_readme_fits_two_screens():
    """A screen has 40 lines of 160 characters, as in a browser. Paragraphs wrap, and marks are invisible."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith(("<!--", "```", "|---"))]
    assert sum(max(1, -(-len(line) // 160)) for line in lines) <= 80
