"""A folder with a GGUF file in it is a model, too."""

import pytest
import torch

from fade_fast.hf import loading

from ..models import tiny_llama


def test_a_folder_of_one_gguf_file(tmp_path, monkeypatch):
    model, read = tiny_llama(layers=1), []
    monkeypatch.setattr(loading, "_missing_packages", lambda: [])
    monkeypatch.setattr(loading, "_read_gguf", lambda *args: read.append(args) or (model, "tokenizer"))
    (tmp_path / "a.gguf").touch()
    assert loading.load(tmp_path, "cpu", "fp32") == (model, "tokenizer")
    assert read == [(tmp_path / "a.gguf", torch.float32)]
    (tmp_path / "b.gguf").touch()
    with pytest.raises(loading.LoadError, match="2 GGUF files in it, and one is needed"):
        loading.load(tmp_path, "cpu")
    (tmp_path / "config.json").write_text("{}")  # a model as transformers saves it comes first
    with pytest.raises(loading.LoadError):
        loading.load(tmp_path, "cpu")
    assert len(read) == 1


def test_gguf_needs_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_missing_packages", lambda: ["gguf"])
    (tmp_path / "a.gguf").touch()
    with pytest.raises(loading.LoadError, match="reading GGUF needs gguf"):
        loading.load(tmp_path, "cpu")
