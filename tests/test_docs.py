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


#: Names of callables that take a message to the user.
RAISED = re.compile(r"(.*(Error|Warning|Full)|warn|Verification|_wrong)$")
#: Which positional argument is the message, where it is not the first.
ARGUMENT = {"_wrong": 1}


def messages(source: str) -> list[str]:
    """The texts of the errors and warnings of a module, with `{}` for the parts that depend on the case."""
    tree = ast.parse(source)
    constants = {}  # texts that have a name
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr):
            constants |= {x.id: node.value for x in node.targets if isinstance(x, ast.Name)}

    def text(node: ast.expr) -> str:
        """The text of an expression; empty if it is no literal."""
        node = constants.get(node.id, node) if isinstance(node, ast.Name) else node
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) or "{}" for part in node.values)
        if isinstance(node, ast.FormattedValue) and "install_command(" in ast.unparse(node.value):
            return "pip install {}"
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""

    found = []
    for node in ast.walk(tree):
        name = isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name and RAISED.match(name):
            at = ARGUMENT.get(name, 0)
            found += ["{}: " * at + text(x) for x in node.args[at : at + 1]]
            found += [text(x.value) for x in node.keywords if " " in text(x.value)]  # a word is a code
    return [message for message in found if message.strip(" {}:;,.()")]


def test_how_messages_are_found():
    source = """
SAID = "a name"
raise ValueError(f"a {x}: b {install_command('c')}")
warnings.warn("d", stacklevel=2)
raise E(y)
raise ValueError(str(e))
raise ValueError(f"{x}: {e}")
raise ValueError(SAID)
f("g")
raise _wrong("h", "i")
Verification(untried=f"{j} k")
RequestError("l", code="m")
"""
    assert messages(source) == ["a {}: b pip install {}", "d", "a name", "{}: i", "{} k", "l"]


#: What a clause that tells the user what to do begins with.
ORDERS = """
    call change choose compare convert correct create crop decode delete feed generate give install keep leave
    load lower make name pass pip put() read record reset() save see send set shorten start train try use wait
    write
""".split()
CURES = re.compile(
    rf"""
    (^|[:;.,)]\ |\b(and|or|To\ [^,.]+,)\ )({"|".join(map(re.escape, ORDERS))})(?!\w)  # an order
    | \b(is|are)\ (allowed|needed|possible|served|supported)\b | \ballowed:\   # what can be served
    | \bit\ (must|needs)\ | \bneeds?\ \w+= | \btakes\ \[ | \bits\ (arguments|fields)\ are\b  # the same
    | (`fade\ [^`]+`|[\w.]+\([^()]*\)|\w+=[\w']+|fade_fast\.\w+)\ (\w+\ )?  # what does the work, and which
      (brings|lists|makes|needs|replaces|stores|takes?|writes)\b
    """,
    re.VERBOSE | re.IGNORECASE,
)


def has_cure(message: str) -> bool:
    """Whether a message tells what to do, or what is allowed, after it has told what is wrong."""
    _, *rest = re.split(r"(?<=[:;.,])\s", message, maxsplit=1)
    return bool(rest) and CURES.search(rest[0]) is not None


def test_what_counts_as_a_cure():
    told = """
x={}: an integer of at least 1 is allowed
x is wrong: pass a number
x is wrong; give y, or leave x out
cannot read {}: {}; make it again with `fade calibrate`
x is of another model: create_cache(model) makes one for it
x needs {}: pip install {}
"""
    bare = """
x is wrong
x is wrong: y is 3
cannot read {}: {}
the last layer has {} heads, its calibration is for {}
use of x: it was used by another thread
x cannot be served, and y is not allowed
x is slow. The text is right
"""
    for line in told.strip().splitlines():
        assert has_cure(line), line
    for line in bare.strip().splitlines():
        assert not has_cure(line), line


#: Messages without a cure of their own, and the reason.
ENDS, PART = "another message with a cure stands in it", "it stands in another message with a cure"
WITHOUT = {
    "--config {}": ENDS,
    "cannot load model {}: {}": ENDS,
    "cannot plan for {}: {}": ENDS,
    "cannot read the configuration of {}: {}": ENDS,
    "layer {}: {}": ENDS,
    "{}. So this cache has the codec 'rotated'": ENDS,
    "its header is no object": PART,
    "tensors without a place: {}": PART,
    "{} is no JSON": PART,
    "the client does not read": "the connection is closed, and nobody sees it",
}


def test_every_message_tells_its_cure():
    """Users do not call kernels directly, and `measure` has words of its own."""
    files = [*(ROOT / "fade_fast").rglob("*.py"), ROOT / "fade_ref/config.py", ROOT / "fade_ref/tiers.py"]
    raised = [
        (message, path.relative_to(ROOT))
        for path in files
        if path.parent.name not in ("kernels", "measure") and path.name != "deprecated.py"
        for message in messages(path.read_text(encoding="utf-8"))
    ]
    assert len(raised) > 250
    missing = [f"{path}: {x}" for x, path in raised if not has_cure(x) and x not in WITHOUT]
    assert not missing, "these messages do not say what to do:\n" + "\n".join(missing)
    assert not WITHOUT.keys() - {message for message, _ in raised if not has_cure(message)}


#: What docs/compatibility.md says of a refusal by us, in a cell or in a remark. A late one tells its mode.
REFUSALS = re.compile(
    r"^\| refused(?: late)?: (.*?)(?:, generate\(\), .*?)? \| (?:off|safe|evicting)\b"
    r"|^- .*, every mode: refused: (.*)$",
    re.MULTILINE,
)


def test_the_refusals_of_the_compatibility_page_are_those_of_the_code():
    """The page is written by runs of hours. A message that changes is changed there, too."""
    sources = (path for folder in ("hf", "cache") for path in (ROOT / "fade_fast" / folder).glob("*.py"))
    known = [x for path in sources for x in messages(path.read_text(encoding="utf-8"))]
    # Classes with different errors, or layers, share a line of the page.
    known = [x.replace(", relative error {} (at most {} is rounding)", "") for x in known]
    known = [re.escape(x.replace("layer {} of", "a layer of")).replace(r"\{\}", ".*") for x in known]
    pattern = re.compile("|".join(x for x in known if len(x.replace(".*", "")) > 40))
    said = [
        "".join(x) for x in REFUSALS.findall((ROOT / "docs/compatibility.md").read_text(encoding="utf-8"))
    ]
    assert len(said) > 30
    assert [x for x in said if not pattern.fullmatch(x)] == []


def test_the_readme_fits_two_screens():
    """A screen has 40 lines of 160 characters, as in a browser. Paragraphs wrap, and marks are invisible."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith(("<!--", "```", "|---"))]
    assert sum(max(1, -(-len(line) // 160)) for line in lines) <= 80
