"""A folder with a GGUF file in it is a model, too."""

import sys

import pytest
import torch
import transformers
from packaging.version import Version

from fade_fast.hf import loading

from .. import gguf_files


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="transformers 5.17 looks on the hub for the tokenizer of so small a GGUF file",
)
def test_a_folder_of_one_gguf_file(tmp_path):
    gguf_files.write(tmp_path / "a.gguf")
    model, tokenizer = loading.load(tmp_path, "cpu", "fp32")
    assert model.dtype == torch.float32 and model.config.num_hidden_layers == 1
    assert model(**tokenizer("ab c", return_tensors="pt")).logits.isfinite().all()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(loading.LoadError, match="2 GGUF files in it, and one is needed"):
        loading.load(tmp_path, "cpu")
    (tmp_path / "config.json").write_text("{}")  # a model as transformers saves it comes first
    with pytest.raises(loading.LoadError, match="cannot load model") as refused:
        loading.load(tmp_path, "cpu")
    assert "GGUF" not in str(refused.value)


def test_gguf_needs_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if the package was not installed
    (tmp_path / "a.gguf").touch()
    with pytest.raises(loading.LoadError, match="reading GGUF needs gguf"):
        loading.load(tmp_path, "cpu")
