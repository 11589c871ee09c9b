"""Print on one line the versions that tests run with."""

import platform

import torch
import transformers

versions = dict(
    python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__
)
print(", ".join(f"{name} {version}" for name, version in versions.items()))
