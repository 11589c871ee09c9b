"""Files are written whole or not at all."""

import json

import pytest

from fade_fast.saved import files


def test_an_interrupt_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, [1, "ä"])
    assert json.loads(path.read_text(encoding="utf-8")) == [1, "ä"]
    with pytest.raises(KeyboardInterrupt), files.whole(path) as written:
        written.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text(encoding="utf-8")) == [1, "ä"] and list(tmp_path.iterdir()) == [path]
    with path.open(encoding="utf-8") as before:
        files.write_json(path, [2])  # a new file: the old one was never half written
        assert json.load(before) == [1, "ä"] and json.loads(path.read_text()) == [2]
    with pytest.raises(OSError):
        files.write_json(tmp_path / "none" / "a.json", [])
