"""``minipaged pack``: where the file goes, what is said, what is refused."""

from __future__ import annotations

from minipaged.model import packed_model
from minipaged.model.packed_file import is_packed


def test_packing_beside_and_to_a_file(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_model, "home", lambda: tmp_path / "home")
    code, out, err = cli("pack", "tiny-draft", "--quantization", "int8")
    (path,) = (tmp_path / "home" / "packed").iterdir()
    assert (code, out) == (0, f"{path}\n")
    assert "int8 weights" in err and "later starts" in err
    assert is_packed(path)
    code, out, err = cli("pack", "tiny-draft", "--dtype", "bfloat16", "--output", tmp_path / "a.mpk")
    assert (code, out) == (0, f"{tmp_path / 'a.mpk'}\n")
    assert "bfloat16 weights" in err and "give this file as the model" in err
    code, out, err = cli("inspect", tmp_path / "a.mpk")
    assert code == 0 and "bfloat16" in out


def test_what_is_refused(cli, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    code, out, err = cli("pack", "tiny-draft", "--output", tmp_path / "notes.txt")
    assert code == 2 and "left alone" in err and out == ""
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    assert cli("pack", "no-such-model")[0] == 2
    assert cli("pack", "tiny-draft", "--dtype", "float16")[0] == 2
