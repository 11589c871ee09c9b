"""The benchmark of the server, on a tiny model."""

import pytest

pytest.importorskip("fastapi", reason='the extra "serve" is not installed')
pytest.importorskip("uvicorn", reason='the extra "serve" is not installed')

from fade_fast.measure import serve  # noqa: E402
from fade_fast.measure.parsers.serve import arguments  # noqa: E402

from ..models import tiny_llama  # noqa: E402
from ..tokenizers import TEMPLATE, byte_tokenizer  # noqa: E402


@pytest.mark.slow
def test_both_measurements(tmp_path):
    model = tiny_llama(heads=1, head_dim=32)
    args = arguments(["--new", "24", "--rounds", "1", "--prompt", "700"])
    report = serve.measure(model, byte_tokenizer(TEMPLATE), args, tmp_path)
    assert [x["how"] for x in report["tokens"]] == ["generate", "server"]
    assert all(x["wall"] > 0 and x["cpu"] > 0 for x in report["tokens"])
    exact, longest, fresh = report["turns"]
    assert fresh["cached"] == 0 < exact["cached"] <= longest["cached"] < longest["prompt"]
    assert exact["prompt"] - exact["cached"] < 250
    shown = serve.table(report)
    assert "generate" in shown and "longest" in shown
