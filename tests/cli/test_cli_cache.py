"""``minipaged cache``: save and load over two command lines, what is said, what is refused."""

OPTIONS = ("--model", "tiny", "--device", "reference", "--num-blocks", "64")
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings"


def test_saving_and_loading_text(cli, tmp_path):
    path = tmp_path / "play.kv"
    code, out, err = cli("cache", "save", path, "--raw", "--prompt", TEXT, *OPTIONS)
    assert (code, out) == (0, f"{path}\n") and "tokens" in err
    code, out, err = cli("cache", "load", path, *OPTIONS)
    assert code == 0 and "tokens, sound" in out
    sampling = ("--temperature", "0", "--max-tokens", "8")
    code, answer, err = cli("cache", "load", path, "--raw", "--prompt", TEXT + " and", *sampling, *OPTIONS)
    assert code == 0 and f"came from {path}" in err and not err.startswith("0 of")
    assert cli("generate", "--raw", TEXT + " and", *sampling, *OPTIONS)[1] == answer


def test_a_system_message_is_saved_for_every_question(cli, tmp_path):
    path = tmp_path / "system.kv"
    assert cli("cache", "save", path, "--system", TEXT, *OPTIONS)[0] == 0
    sampling = ("--temperature", "0", "--max-tokens", "8")
    for question in ("Why?", "Where is the king?"):
        same = ("--system", TEXT, *sampling, *OPTIONS)
        code, answer, err = cli("cache", "load", path, "--prompt", question, *same)
        assert code == 0 and "minipaged:" not in err and not err.startswith("0 of")
        assert cli("generate", question, *same)[1] == answer


def test_prompts_from_files_and_stdin(cli, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    files = [tmp_path / name for name in "abc"]
    ways = [("--prompt", TEXT), ("--file", tmp_path / "text"), ("--prompt", "-")]
    for path, arguments in zip(files, ways, strict=True):
        assert cli("cache", "save", path, "--raw", *arguments, *OPTIONS, stdin=TEXT.encode())[0] == 0
    assert len({path.read_bytes() for path in files}) == 1


def test_refusals(cli, tmp_path):
    path = tmp_path / "play.kv"
    assert cli("cache", "save", path, "--raw", "--prompt", TEXT, *OPTIONS)[0] == 0
    code, out, err = cli("cache", "load", path, *OPTIONS, "--block-size", "8")
    assert code == 2 and "block_size" in err and not out
    code, out, err = cli("cache", "load", tmp_path / "none.kv", *OPTIONS)
    assert code == 2 and "does not exist" in err
    code, out, err = cli("cache", "save", path, *OPTIONS)
    assert code == 2 and "nothing to save" in err
    code, out, err = cli("cache", "save", path, "--prompt", "a", "--file", "b", *OPTIONS)
    assert code == 2 and "one of the two" in err
    code, out, err = cli("cache", "save", path, "--raw", "--system", "b", *OPTIONS)
    assert code == 2 and "chat template" in err
    code, out, err = cli("cache", "save", path, "--raw", "--prompt", "short", *OPTIONS)
    assert code == 2 and "fewer than one block" in err
