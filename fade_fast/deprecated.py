"""Old import paths of public names. Each still works, and warns that the path is deprecated."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from pathlib import Path

PACKAGE = __package__
#: Old modules of this package, and the modules that hold their public names now.
MOVED = {
    "attention": "hf.attention",
    "buffers": "cache.buffers",
    "calls": "hf.generate",
    "capture": "cache.cuda_graph",
    "check": "hf.check",
    "checkpoint": "saved.checkpoint",
    "create": "hf.create",
    "entry": "hf.entry",
    "files": "saved.files",
    "gradient": "hf.gradient",
    "guard": "cache.guard",
    "importance": "policies.scores",
    "kernels.compile": "compile.compiled",
    "kernels.exact": "kernels.dense",
    "kernels.rows": "compile.small_matmul",
    "kernels.step": "kernels.decode",
    "layer": "cache.layer",
    "loading": "hf.loading",
    "masks": "cache.masks",
    "middle": "cache.store",
    "models": "hf.models",
    "plan": "policies.plan",
    "prompts": "hf.prompts",
    "rope_probe": "hf.rope_probe",
    "snapshot": "saved.snapshot",
    "stepper": "cache.decode_graph",
    "telemetry": "saved.telemetry",
    "timeline": "cache.positions",
    "train_policy": "hf.train_policy",
    "undisturbed": "hf.undisturbed",
    "verify": "hf.verify",
    "versions": "hf.versions",
}
#: Modules that became packages. Their old names are looked up here.
PACKAGES = {"cache": "hf.cache"}
#: Modules with the name of a public function. An import must not put the module in the function's place.
HIDDEN = {"attach": "hf.attach"}


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{PACKAGE}.{old} moved to {PACKAGE}.{new}; the old path will be removed",
        DeprecationWarning,
        stacklevel=3,  # frames of importlib are not counted
    )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the old modules. Importing one gives the new module itself."""

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        old = fullname.removeprefix(f"{PACKAGE}.")
        return importlib.util.spec_from_loader(fullname, self) if old != fullname and old in MOVED else None

    def create_module(self, spec):
        return None

    def exec_module(self, module) -> None:
        old = module.__name__.removeprefix(f"{PACKAGE}.")
        _warn(old, MOVED[old])
        sys.modules[module.__name__] = importlib.import_module(f"{PACKAGE}.{MOVED[old]}")


def _attribute_of(package: str, new: str):
    modules = {path.stem for path in Path(__file__).with_name(package).glob("*.py")}

    def __getattr__(name: str):
        # `from fade_fast.cache import step` asks for an attribute first, then imports the module.
        old = not name.startswith("_") and name not in modules
        if old and hasattr(module := importlib.import_module(f"{PACKAGE}.{new}"), name):
            _warn(f"{package}.{name}", f"{new}.{name}")
            return getattr(module, name)
        raise AttributeError(f"module {PACKAGE}.{package!r} has no attribute {name!r}")

    return __getattr__


def install() -> None:
    """Let the old paths be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    for package, new in PACKAGES.items():
        importlib.import_module(f"{PACKAGE}.{package}").__getattr__ = _attribute_of(package, new)
    for old, new in HIDDEN.items():
        module = sys.modules[f"{PACKAGE}.{old}"] = types.ModuleType(f"{PACKAGE}.{old}")
        module.__getattr__ = _attribute_of(old, new)
