"""The programs of docs/cookbook: with a tiny model all of them, and one with the real model."""

import importlib.util
from pathlib import Path

import pytest
import torch

from .models import compressed_tokens, tiny_llama
from .tokenizers import TEMPLATE, byte_tokenizer

FOLDER = Path(__file__).parents[1] / "docs/cookbook"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py"))


def program(name: str):
    """A program as a module."""
    location = importlib.util.spec_from_file_location(f"cookbook_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return tiny_llama(heads=1, head_dim=32)


@pytest.fixture
def tokenizer():
    return byte_tokenizer(TEMPLATE)


TEXT = "Room 1 belongs to A. " * 10


def test_every_program_is_tested_and_listed():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(PROGRAMS) >= 7 and set(PROGRAMS) <= tests
    assert all(f"[{name}.py]({name}.py)" in listed for name in PROGRAMS)


def test_long_document(model, tokenizer):
    answers, cache = program("long_document").main(model, tokenizer, TEXT, ("What?", "And?"))
    assert len(answers) == 2 and all(answers)
    assert compressed_tokens(cache) > 100


def test_batch(model, tokenizer):
    prompts = ["Once upon a time there was a", "One", "Two and three"]
    texts, cache = program("batch").main(model, tokenizer, [prompt * 6 for prompt in prompts], 12)
    alone = [program("batch").main(model, tokenizer, [prompt * 6], 12)[0][0] for prompt in prompts]
    assert compressed_tokens(cache) >= 64 and texts == alone


def test_questions(model, tokenizer):
    answers, memory = program("questions").main(model, tokenizer, TEXT, ("Who? ", "Why? ", "Who? "))
    assert answers[0] == answers[2] and memory.tokens["INT4"] > 100


def test_resume(model, tokenizer, tmp_path):
    resumed, went_on, cache = program("resume").main(model, tokenizer, TEXT, "And?", tmp_path)
    assert resumed == went_on and compressed_tokens(cache) > 100


def test_openai_client(model, tokenizer):
    pytest.importorskip("fastapi", reason='the extra "serve" is not installed')
    pytest.importorskip("openai", reason="openai is not installed")
    from fade_fast.serve.engine import Options

    answers = program("openai_client").main(
        model, tokenizer, Options(chunk=16), text=TEXT, questions=("What?", "And?"), new=10
    )
    (_, first), (_, second) = answers
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens >= first.prompt_tokens - 16


def test_own_policy(model, tokenizer):
    from fade_fast.policies import scores

    before = dict(scores.OBSERVERS)
    ours, theirs = program("own_policy").main(model, tokenizer, TEXT, budget=40)
    assert scores.OBSERVERS == before
    kept = [layer.middle.position(layer.middle.tiers[0]) for layer in (ours.tiered[0], theirs.tiered[0])]
    assert kept[0].shape == kept[1].shape and not torch.equal(*(x.sort().values for x in kept))
    assert kept[0].float().mean() > kept[1].float().mean()  # younger tokens


def test_choose_widths(model, tokenizer):
    results = program("choose_widths").main(model, tokenizer, TEXT * 2, recent_window=16, block_size=16)
    exact = results["uncompressed"][0]
    error = {name: abs(loss - exact) for name, (loss, _) in results.items()}
    assert 0 < error["8 bits"] < error["2 bits"]
    sizes = [results[name][1] for name in ("uncompressed", "8 bits", "4 bits", "2 bits")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_answers_about_a_document(smollm2):
    module = program("long_document")
    document = " ".join(module.DOCUMENT.split(". ")[:12])
    answers, cache = module.main(*smollm2, document, module.QUESTIONS[:1])
    assert compressed_tokens(cache) >= 64 and "day 3" in answers[0]
