"""The reference of the public interface: it is complete, so are its docstrings, and it builds."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fade_fast

ROOT = Path(__file__).parents[1]
pytest.importorskip("griffe", reason='the extra "docs" is not installed')
location = importlib.util.spec_from_file_location("docstrings", ROOT / "docs/docstrings.py")
docstrings = importlib.util.module_from_spec(location)
location.loader.exec_module(docstrings)

MEMBERS = re.compile(r"^::: (\S+)\n    options:\n      members: \[([^\]]*)\]", re.MULTILINE)


@pytest.fixture(scope="module")
def modules():
    return docstrings.loaded()


def directives() -> dict[str, list[str] | None]:
    """What the pages name, and which members they show; None: all public ones."""
    found: dict[str, list[str] | None] = {}
    for page in docstrings.PAGES:
        text = page.read_text(encoding="utf-8")
        found |= dict.fromkeys(docstrings.DIRECTIVE.findall(text))
        found |= {name: [x.strip() for x in names.split(",")] for name, names in MEMBERS.findall(text)}
    return found


def shown(thing, members=None):
    """The functions and classes of a module or a class that its page shows, itself included."""
    if thing.is_function or thing.is_class:
        yield thing
    for name, member in thing.members.items() if thing.is_module or thing.is_class else ():
        public = not name.startswith("_") and not member.is_alias
        if public and (members is None or name in members):
            yield from shown(member)


def test_the_docstrings_are_prepared():
    text = "It adds.\n\nArgs:\n    a, b: numbers,\n        both.\n    c: more.\n\n>>> add(1, 2)\n3\n\nEnd."
    assert docstrings.prepared(text) == (
        "It adds.\n\nArgs:\n    a: numbers,\n        both.\n    b: numbers,\n        both.\n    c: more.\n\n"
        "```pycon\n>>> add(1, 2)\n3\n```\n\nEnd."
    )
    unchanged = "Returns a, b: both.\n\n    x = 1\n"
    assert docstrings.prepared(unchanged) == unchanged


def test_every_public_name_has_its_place(modules):
    named = directives()
    assert {f"fade_fast.{name}" for name in fade_fast.__all__} <= set(named)
    spec = {f"fade_ref.{path.stem}" for path in (ROOT / "fade_ref").glob("*.py")}
    assert spec - set(named) == {"fade_ref.__init__", "fade_ref.moved"}
    for name, members in named.items():
        thing = docstrings.target(modules, name)
        assert thing.docstring and set(members or ()) <= set(thing.members), name


def test_the_tables_are_fresh(modules):
    for page in docstrings.PAGES:
        text = page.read_text(encoding="utf-8")
        assert docstrings.tabled(text, modules) == text, "python docs/docstrings.py"


def test_docstrings_are_complete(modules):
    """Each has a docstring; types, what is raised and, where users call it, every argument are told."""
    wrong, count = [], 0
    for name, members in directives().items():
        for one in shown(docstrings.target(modules, name), members):
            count += 1
            text = one.docstring.value if one.docstring else ""
            given = [
                x for x in one.parameters if x.name not in ("self", "cls") and not x.name.startswith("_")
            ]
            typed = all(x.annotation is not None for x in given)
            typed &= one.is_class or one.returns is not None
            body = "\n".join(one.lines).replace(text, "") if one.is_function else ""
            told = "raise" in text.lower() or not re.search(r"^\s+raise ", body, re.MULTILINE)
            public = not name.startswith("fade_ref") or name == "fade_ref.config"
            untold = [x.name for x in given if public and not re.search(rf"\b{x.name}\b", text)]
            if not (text and typed and told) or untold:
                wrong.append((one.path, dict(text=bool(text), typed=typed, raises=told, untold=untold)))
    assert count > 150 and not wrong


@pytest.mark.slow
def test_the_reference_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason='the extra "docs" is not installed')
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "-d", str(tmp_path)]
    environment = os.environ | dict(NO_MKDOCS_2_WARNING="1")
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, members in directives().items():
        page = next(x for x in docstrings.PAGES if f"::: {name}\n" in x.read_text(encoding="utf-8"))
        text = (tmp_path / f"{page.stem}.html").read_text(encoding="utf-8")
        assert all(f'id="{name}.{x}"' in text for x in members or ()), name
        assert f'id="{name}"' in text
        assert not re.search(r'(src|href)="https?://(?!squidfunk|www\.mkdocs)[^"]*\.(js|css|woff2?)', text)
    config = (tmp_path / "config.html").read_text(encoding="utf-8")
    assert (
        "KL divergence, in nats a token" in config
        and "&gt;&gt;&gt; FadeConfig" not in config.split("<pre")[0]
    )
    assert "multiplies q.k" in (tmp_path / "spec.html").read_text(encoding="utf-8")  # a field's comment


PROGRAM = """
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import fade_fast
from fade_fast import FadeConfig

model: PreTrainedModel = AutoModelForCausalLM.from_pretrained("x")
cache = fade_fast.create_cache(model, FadeConfig(int4_budget=3, layer_bits={0: (8, 8)}), max_length=100)
reveal_type(cache)
reveal_type(cache.memory())
reveal_type(cache.memory().tokens)
reveal_type(cache.get_seq_length())
reveal_type(cache.snapshot())
reveal_type(cache.choice)
reveal_type(fade_fast.load_cache("file", model, max_length=9))
reveal_type(FadeConfig.recall())
reveal_type(fade_fast.check_model(model, "safe", length=100).layers)
loaded, tokenizer = fade_fast.loading.load()
for piece in fade_fast.stream(loaded, tokenizer, "hello", cache, stop="."):
    reveal_type(piece)
for pair in fade_fast.stream(loaded, tokenizer, [{"role": "user", "content": "hello"}], summaries=True):
    reveal_type(pair)
reveal_type(fade_fast.common_prefix(cache, torch.ones(1, 2)))
with cache.listen(lambda event: print(event["event"])) as listener, fade_fast.attach(model) as attached:
    reveal_type(listener)
    reveal_type(attached)
cache.save("file")
fade_fast.detach(model)
fade_fast.create_cache(model, maxlength=3)  # wrong
FadeConfig(nope=1)  # wrong
cache.crop("a")  # wrong
cache.listen(3)  # wrong
fade_fast.nothing  # wrong
"""
REVEALED = [
    "fade_fast.hf.cache.TieredKVCache",
    "fade_fast.saved.memory.Memory",
    "dict[str, float]",
    "int",
    "dict[Any, Any]",
    "fade_fast.hf.widths.Choice | None",
    "fade_fast.hf.cache.TieredKVCache",
    "fade_ref.config.FadeConfig",
    "tuple[fade_fast.hf.check.LayerCheck, ...]",
    "str",
    "tuple[str, fade_fast.hf.stream.Summary]",
    "int",
    "fade_fast.saved.telemetry.Listener",
    "transformers.modeling_utils.PreTrainedModel",
]


@pytest.mark.slow
def test_a_type_checker_accepts_the_public_surface(tmp_path):
    """mypy finds no error in the modules that `pyproject.toml` names, and reads a program as it is meant."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    line = [
        sys.executable,
        "-m",
        "mypy",
        "--no-pretty",
        "--show-absolute-path",
        f"--cache-dir={tmp_path}/cache",
    ]
    line += [*project["tool"]["mypy"]["files"], str(program)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 1, done.stderr or done.stdout
    found = [x for x in done.stdout.splitlines() if ": error: " in x]
    wrong = [i for i, x in enumerate(PROGRAM.splitlines(), 1) if "# wrong" in x]
    assert [x for x in found if "program.py" not in x] == []
    assert [int(x.partition("program.py:")[2].partition(":")[0]) for x in found] == wrong, done.stdout
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert [x.replace("builtins.", "") for x in revealed] == REVEALED
