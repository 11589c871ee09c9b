"""Print the versions for the tests on one line."""

import platform

import torch
import transformers

versions = dict(
    python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__
)
print(", ".join(f"{name} {version}" for name, version in versions.items()))
