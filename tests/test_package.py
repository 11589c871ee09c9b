"""The distribution: what imports load, what type checkers see, and what the wheel contains."""

import ast
import dataclasses
import importlib
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

import fade_fast
from fade_fast import errors
from fade_fast.cli import command

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
#: Packages that only some commands need.
TRAINING = {"sklearn", "scipy"}
SLOW = {"torch", "transformers", "numpy", "matplotlib", *TRAINING}


def loaded(statements: str, *, absent: set[str] = frozenset()) -> set[str]:
    """Top packages that a new process has imported after `statements`, in which `absent` cannot be."""
    hide = "".join(f"sys.modules[{name!r}] = None\n" for name in sorted(absent))
    show = "\nprint(*sorted({name.split('.')[0] for name, x in sys.modules.items() if x is not None}))"
    run = [sys.executable, "-c", f"import sys\n{hide}{statements}{show}"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_help_and_import_load_nothing_slow():
    help = "import fade_fast.cli\ntry:\n    fade_fast.cli.main(['--help'])\nexcept SystemExit:\n    pass"
    found = loaded(f"{help}\nfade_fast.__version__\ndir(fade_fast)")
    assert "fade_fast" in found and not found & SLOW


#: Arguments that each command refuses, beside an option that it does not have. A check of a value must not
#: import torch, either.
WRONG = (
    "plan --gpu 24", "plan --gpu 24GB --config nonsense", "demo --config nonsense", "demo --device abacus",
    "check --config n_sink=-1", "generate --config nonsense", "generate", "generate --prompt a --compare",
    "serve --config nonsense", "serve --n-sink -1", "serve --engine vllm", "serve --reuse x", "warm --mode x",
    "calibrate", "vllm-calibrate", "train-codebook --text none.txt", "inspect none", "plot none",
    "train-policy --dtype x", "parity --dtype x", "parity --compiled x", "quality --configs nonsense",
    "quality --configs int4:n_sink=-1", "quality --length 100", "quality --free --margin -1",
    "quality --suite report --parts x", "memory --lengths 0", "needles --depths 101", "ruler --lengths 100",
    "bench --new 3", "bench --device abacus", "bench --json none/none.json", "bench generate --methods x",
    "bench choose --read 7", "bench choose --cases 1", "bench throughput --only x",
    "bench parallel --parts x",
)  # fmt: skip


def test_help_and_wrong_options_load_nothing_slow():
    """Of each command, in one process: torch alone takes seconds to import."""
    commands = [*command.COMMANDS, *command.PASSED, *(f"bench {name}" for name in command.BENCHES)]
    commands += [f"quality {' '.join(x)}" for x in (command.REPORT[:-1], command.FREE[:-1])]
    lines = [f"{name} {option}" for name in commands for option in ("--help", "--no-such-option")]
    answers = f"""
from fade_fast.cli import main
for line in {[*lines, *WRONG]}:
    try:
        code = main(line.split())
    except SystemExit as stopped:
        code = stopped.code
    assert code == (0 if "--help" in line else 2), (line, code)
    slow = {SLOW} & set(sys.modules)
    assert not slow, (line, slow)
"""
    assert "fade_fast" in loaded(answers)


@pytest.mark.slow
def test_the_public_names_and_commands_work_without_the_packages_that_train():
    """Nothing but training imports scikit-learn and scipy: without them, all else is imported."""
    passed = [module for module, _ in command.PASSED.values()] + list(command.BENCHES.values())
    public = "import fade_fast\n[getattr(fade_fast, name) for name in fade_fast.__all__]"
    modules = f"import importlib\n[importlib.import_module(x) for x in {passed}]"
    work = [path.stem for path in (ROOT / "fade_fast/cli").glob("*.py") if path.stem != "plots"]  # it draws
    commands = f"[importlib.import_module('fade_fast.cli.' + x) for x in {work}]"
    found = loaded("\n".join([public, modules, commands]), absent={*TRAINING, "matplotlib", "datasets"})
    assert {"torch", "transformers"} <= found


def test_what_type_checkers_read_is_what_is_imported():
    tree = ast.parse(Path(fade_fast.__file__).read_text(encoding="utf-8"))
    (checked,) = (x for x in tree.body if isinstance(x, ast.If) and "TYPE_CHECKING" in ast.unparse(x.test))
    homes = {}
    for node in checked.body:
        module = f"fade_fast.{node.module}" if node.level else node.module
        homes |= {alias.name: module for alias in node.names}
    assert homes == fade_fast._HOMES and set(homes) == set(fade_fast.__all__)
    assert fade_fast.FadeConfig.__module__ == "fade_ref.config"
    assert fade_fast.loading is importlib.import_module("fade_fast.hf.loading")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fade_fast.nonsense
    with pytest.raises(AttributeError) as said:
        _ = fade_fast.create_cach
    assert said.value.name == "create_cach" and said.value.obj is fade_fast  # Python then names create_cache


def test_the_wheel_contains_our_three_packages():
    found = find_packages(str(ROOT), **PROJECT["tool"]["setuptools"]["packages"]["find"])
    assert {name.split(".")[0] for name in found} == {"fade_fast", "fade_ref", "parity"}
    for name, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        assert "py.typed" in patterns and all(list((ROOT / name).glob(pattern)) for pattern in patterns)


def test_messages_name_this_distribution_and_extras_that_exist():
    """`pip install fade` would fetch an unrelated package."""
    assert PROJECT["project"]["name"] == "fade-fast"
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(command.EXTRAS.values()) <= set(extras)
    needed = " ".join(PROJECT["project"]["dependencies"])
    assert not any(name in needed for name in ("scikit-learn", "scipy", "matplotlib", "datasets"))
    sources = [
        x
        for top in ("fade_fast", "fade_ref", "parity", "benchmarks", "docs")
        for x in (ROOT / top).rglob("*")
    ]
    for path in [ROOT / "README.md", *sources]:
        if path.suffix in (".py", ".md"):
            text = path.read_text(encoding="utf-8")
            assert 'install "fade[' not in text and "install fade " not in text, path


@pytest.mark.parametrize("packages", [("no_such_a", "no_such_b"), ("json", "no_such_b")])
def test_a_missing_package_is_named_with_its_extra(packages):
    errors.require("this", "train", "json")
    with pytest.raises(ImportError, match=r'this needs .*no_such_b: pip install "fade-fast\[train\]"'):
        errors.require("this", "train", *packages)


@pytest.mark.parametrize(
    "call, says",
    [
        (
            lambda: fade_fast.FadeConfig(int4_buget=3),
            "no field 'int4_buget' .did you mean int4_budget",
        ),
        (lambda: fade_fast.FadeConfig(colour=3), "no field 'colour'.*; its fields are n_sink, recent_window"),
        (
            lambda: fade_fast.create_cache(None, maxlength=3),
            "'maxlength' .did you mean max_length",
        ),
        (
            lambda: fade_fast.create_cache(None, n_sink=3),
            r"pass config=FadeConfig\(n_sink=3",
        ),
        (lambda: fade_fast.load_cache("a", None, colour=3), "no argument 'colour'.*; its arguments are path"),
    ],
)
def test_an_unknown_keyword_lists_what_there_is(call, says):
    with pytest.raises(TypeError, match=says):
        call()


def test_what_type_checkers_read_of_functions_with_checked_keywords():
    assert "max_length" in inspect.signature(fade_fast.create_cache).parameters
    assert list(inspect.signature(fade_fast.FadeConfig).parameters)[:2] == ["n_sink", "recent_window"]
    with pytest.raises(TypeError, match="has no field 'colour'"):
        dataclasses.replace(fade_fast.FadeConfig(), colour=3)
    config = fade_fast.FadeConfig(2, recent_window=32)
    assert (config.n_sink, config.recent_window) == (2, 32) and pickle.loads(pickle.dumps(config)) == config
