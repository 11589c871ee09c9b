"""Prepares our docstrings for mkdocstrings.

Examples become blocks, `a, b: ...` documents both names, and the comment after a field is its docstring.

`python docs/docstrings.py` writes the tables at the head of the pages in docs/reference, so that these can be
read without a site.
"""

import re
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/reference").glob("*.md"))
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
TABLE = re.compile(r"^\| name \|.*\n(?:\|.*\n)+", re.MULTILINE)

EXAMPLE = re.compile(r"(?:^[ \t]*>>> .*\n?)(?:^(?![ \t]*$).*\n?)*", re.MULTILINE)
SEVERAL = re.compile(r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<text>.*)$")


def prepared(text: str) -> str:
    """A docstring as mkdocstrings reads it best."""
    text = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
    lines = text.split("\n")
    done: list[str] = []
    while lines:
        line = lines.pop(0)
        if not (found := SEVERAL.match(line)):
            done.append(line)
            continue
        rest = []  # continuation lines are indented more
        while lines and lines[0].startswith(found["indent"] + "    "):
            rest.append(lines.pop(0))
        for name in found["names"].split(", "):
            done += [f"{found['indent']}{name}: {found['text']}", *rest]
    return "\n".join(done)


class Docstrings(griffe.Extension):
    """Applies `prepared` to every docstring, and gives fields theirs."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        """Change the docstring of a module, a class, a function or a field."""
        if obj.docstring:
            obj.docstring.value = prepared(obj.docstring.value)
        elif obj.is_attribute and obj.parent.is_class and obj.lines:
            comment = re.search(r"  # (?!noqa|type:)(.+)$", obj.lines[-1])
            if comment:
                obj.docstring = griffe.Docstring(comment[1], parent=obj, lineno=obj.lineno)


def loaded() -> griffe.ModulesCollection:
    """Our packages, read without importing them."""
    loader = griffe.GriffeLoader(search_paths=[ROOT], extensions=griffe.load_extensions(Docstrings()))
    for name in ("fade_ref", "fade_fast"):
        loader.load(name)
    loader.resolve_aliases(implicit=True)
    return loader.modules_collection


def target(modules: griffe.ModulesCollection, name: str) -> griffe.Object:
    """What a directive names. Raises `KeyError` if there is no such thing."""
    found = modules[name]
    return found.final_target if found.is_alias else found


def tabled(text: str, modules: griffe.ModulesCollection) -> str:
    """A page with a fresh table of what its directives name: the first sentence of each docstring."""
    rows = ["| name | what it is |", "|---|---|"]
    for name in DIRECTIVE.findall(text):
        first = " ".join(target(modules, name).docstring.value.partition("\n\n")[0].split())
        rows.append(f"| `{name}` | {re.split(r'(?<=[.!?]) ', first)[0]} |".replace("`|`", "`\\|`"))
    table = "\n".join(rows) + "\n"
    if len(rows) == 2:
        return text
    if TABLE.search(text):
        return TABLE.sub(lambda found: table, text, count=1)
    head, rest = text.split("\n::: ", 1)
    return f"{head}\n{table}\n::: {rest}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(tabled(page.read_text(encoding="utf-8"), loaded()), encoding="utf-8")
