"""The house: which module may import which. Imports are read with `ast`, those inside functions included."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fade_ref", "fade_fast", "parity", "benchmarks")
#: Folders of fade_fast, from top to bottom. An import goes down or stays on its floor.
FLOORS = (
    {"cli"},
    {"measure"},
    {"serve"},
    {"hf", "vllm"},
    {"saved", "cache"},
    {"policies", "formats", "kernels"},
    {"compile"},
)
#: These folders of fade_fast know neither transformers nor vLLM.
NEUTRAL = {"cache", "policies", "formats", "kernels", "compile"}
#: Modules of fade_ref that fade_fast imports: vocabulary, and the arithmetic that both share.
SHARED = {"config", "tiers", "scores", "plan", "matched"}
#: Parts of transformers that hold its generation and cache classes, and names of them that it exports.
GENERATION = ("transformers.generation", "transformers.cache_utils")
GENERATES = ("Cache", "Generation", "Stopping", "LogitsProcessor", "Streamer")
#: Tests that may import benchmarks.
OF_BENCHMARKS = ("tests/benchmarks/", "tests/test_benchmarks.py", "tests/test_docs.py")

#: Violations of today, as (file, import). A fixed entry fails the last test, so the set can only shrink.
PENDING: set[tuple[str, str]] = set()


def files(*tops: str) -> list[Path]:
    return sorted(path for top in tops for path in (ROOT / top).rglob("*.py"))


def module_of(path: Path) -> str:
    """`fade_fast/kernels/__init__.py` is `fade_fast.kernels`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in files(*PACKAGES)}


def imports(source: str, module: str, package: bool) -> Iterator[str]:
    """What a module imports, absolute: `from a import b` gives `a.b`, whether b is a module or a name.

    What stands under `if TYPE_CHECKING` is left out: it never runs.
    """
    tree = ast.parse(source)
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            base = ".".join([*up, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@functools.cache
def imported(path: Path) -> list[str]:
    """The imports of a file, each once."""
    found = imports(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py")
    return list(dict.fromkeys(found))


def target(name: str) -> str | None:
    """The module of ours that an import leads to: the longest known beginning of its name."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def floor(module: str) -> int | None:
    """0 for the top floor; None for modules of fade_fast that stand in no folder, and for other packages."""
    top, *rest = module.split(".")
    found = [i for i, names in enumerate(FLOORS) if top == "fade_fast" and rest and rest[0] in names]
    return found[0] if found else None


def is_under(name: str, *tops: str) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def upwards(path: Path, name: str) -> bool:
    """An import of fade_fast that goes up a floor."""
    here, there = floor(module_of(path)), floor(target(name) or "")
    return here is not None and there is not None and there < here


def past_its_folder(path: Path, name: str) -> bool:
    """transformers or vLLM where neither is known; generation and caches outside hf, measure and cli."""
    folder = module_of(path).split(".")[1:2]
    if folder and folder[0] in NEUTRAL:
        return is_under(name, "transformers", "vllm")
    if folder in (["hf"], ["cli"], ["measure"]):
        return False
    exported = name.startswith("transformers.") and any(word in name for word in GENERATES)
    return is_under(name, *GENERATION) or exported


def of_the_specification(path: Path, name: str) -> bool:
    """An import of fade_ref in fade_fast that is neither vocabulary nor shared."""
    return is_under(name, "fade_ref") and name.split(".")[1:2] not in [[module] for module in SHARED]


def out_of_the_specification(path: Path, name: str) -> bool:
    """An import of ours in fade_ref, which imports nothing outside itself."""
    return is_under(name, "fade_fast", "parity", "benchmarks", "tests")


def of_benchmarks(path: Path, name: str) -> bool:
    """An import of benchmarks in a test of something else."""
    return is_under(name, "benchmarks") and not path.relative_to(ROOT).as_posix().startswith(OF_BENCHMARKS)


#: Each rule, and where it holds.
RULES = {
    upwards: "fade_fast",
    past_its_folder: "fade_fast",
    of_the_specification: "fade_fast",
    out_of_the_specification: "fade_ref",
    of_benchmarks: "tests",
}


def violations(rule) -> set[tuple[str, str]]:
    """All of one rule, as (file, import)."""
    return {
        (path.relative_to(ROOT).as_posix(), name)
        for path in files(RULES[rule])
        for name in imported(path)
        if rule(path, name)
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of one circle, the first again at the end; empty if there is none."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module not in done:
            for other in sorted(graph.get(module, ())):
                if found := walk(other, [*trail, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def graph() -> dict[str, set[str]]:
    """Which module imports which, of ours."""
    return {
        module: {there for name in imported(path) if (there := target(name)) and there != module}
        for module, path in MODULES.items()
    }


def test_how_imports_are_read():
    source = "import a.b\nfrom . import c\nfrom ..d import e as f\ndef g():\n    from h import i\n"
    assert list(imports(source, "p.q.r", False)) == ["a.b", "p.q.c", "p.d.e", "h.i"]
    assert list(imports("from . import c", "p.q", True)) == ["p.q.c"]
    assert list(imports("if TYPE_CHECKING:\n    import a\nelse:\n    import b\n", "p", True)) == ["b"]
    assert target("fade_ref.config.FadeConfig") == "fade_ref.config" and target("torch.nn") is None
    assert floor("fade_fast.compile.compiled") == len(FLOORS) - 1 and floor("parity.cases") is None


def test_how_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_folder_of_fade_fast_has_a_floor():
    folders = {path.parent.name for path in (ROOT / "fade_fast").glob("*/__init__.py")}
    assert folders <= set().union(*FLOORS)


def test_no_circle():
    assert circle(graph()) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_imports(rule):
    assert violations(rule) - PENDING == set()


def test_what_is_pending_is_still_a_violation():
    assert set().union(*map(violations, RULES)) >= PENDING


def test_the_specification_needs_no_other_mathematics_until_a_function_asks():
    """scipy and scikit-learn are slow to import: only functions that need them do."""
    for path in files("fade_ref"):
        top = ast.parse(path.read_text(encoding="utf-8")).body
        named = [ast.unparse(node) for node in top if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any("scipy" in line or "sklearn" in line for line in named), path.name
