import dataclasses
import sys
import types
from pathlib import Path

import pytest

from minipaged.errors import DownloadError, LicenseNotAcceptedError, ModelNotFoundError
from minipaged.model import catalog, pull


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty MINIPAGED_HOME; nothing in this file may start pip."""
    monkeypatch.setenv("MINIPAGED_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(catalog.ACCEPT_VARIABLE, raising=False)
    monkeypatch.setattr(pull, "pip_command", lambda: pytest.fail("pip was started"))
    return tmp_path / "home"


@pytest.mark.parametrize("name", ["tiny", "tiny-draft"])
def test_builtin_models_are_always_there_and_their_size_is_true(name):
    entry = catalog.get_entry(name)
    assert entry.builtin and entry.cached and entry.download_size == 0
    assert catalog.resolve(name, pull=False) == entry.path == catalog.pull(name)
    assert sum(file.stat().st_size for file in entry.path.iterdir()) == entry.size
    assert (entry.path / "model.safetensors").is_file()


def test_every_entry_shows_size_and_licence():
    entries = catalog.list_models()
    assert entries[0].name == "smollm2-135m"
    for entry in entries:
        assert entry.size > 0 and entry.num_parameters > 0 and entry.license and entry.description
        assert entry.license_url.startswith("https://")
        assert entry.must_accept == (entry.name == "gemma3-270m")
        assert sum(wheel.member_size for wheel in entry.wheels) == (0 if entry.builtin else entry.size)
        assert all(len(digest) == 64 for digest in [wheel.sha256 for wheel in entry.wheels])
        assert all("==" in wheel.requirement for wheel in entry.wheels)


def test_a_model_that_is_in_its_place_needs_no_network(home):
    entry = catalog.get_entry("smollm2-135m")
    assert not entry.cached
    assert entry.path.is_relative_to(home)
    with pytest.raises(ModelNotFoundError, match="minipaged pull smollm2-135m.*--model tiny"):
        catalog.resolve("smollm2-135m", pull=False)
    entry.path.parent.mkdir(parents=True)
    with entry.path.open("wb") as file:
        file.truncate(entry.size)
    assert entry.cached
    assert catalog.resolve("smollm2-135m", pull=False) == entry.path
    with entry.path.open("r+b") as file:
        file.truncate(entry.size - 1)
    assert not entry.cached


def test_terms_must_be_accepted_before_anything_is_fetched(monkeypatch):
    with pytest.raises(LicenseNotAcceptedError) as refusal:
        catalog.resolve("gemma3-270m")
    terms = catalog.get_entry("gemma3-270m").license_url
    for words in ("Gemma Terms of Use", terms, "--accept-license", "accept_license=True", catalog.ACCEPT_VARIABLE):
        assert words in str(refusal.value)
    pulled = []
    monkeypatch.setattr(pull, "pull_entry", lambda entry, progress: pulled.append(entry.name))
    catalog.pull("gemma3-270m", accept_license=True)
    catalog.resolve("gemma3-270m", accept_license=True)
    monkeypatch.setenv(catalog.ACCEPT_VARIABLE, "other, gemma3-270m")
    catalog.resolve("gemma3-270m")
    assert pulled == ["gemma3-270m"] * 3
    monkeypatch.setenv(catalog.ACCEPT_VARIABLE, "gemma3")
    with pytest.raises(LicenseNotAcceptedError):
        catalog.pull("gemma3-270m")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2", "Did you mean 'smollm2-135m'"),
        ("SmolLM2-135M", "Did you mean 'smollm2-135m'"),
        ("tinny", "Did you mean 'tiny'"),
        ("gemma-3-270m", "Did you mean 'gemma3-270m'"),
        ("meta-llama/Llama-3.2-1B", "write 'hf:meta-llama/Llama-3.2-1B'"),
        ("qqqq", "Known names: smollm2-135m, gemma3-270m, tiny, tiny-draft"),
        ("", "names no model"),
        ("a\0b", "neither a model's name nor an existing path"),
        ("\udcff", "neither a model's name nor an existing path"),
        ("x" * 5000, "neither a model's name nor an existing path"),
    ],
)
def test_unknown_names_get_a_hint(name, words):
    with pytest.raises(ModelNotFoundError, match=words) as refusal:
        catalog.resolve(name)
    str(refusal.value).encode("utf-8")


def test_pull_knows_names_only():
    with pytest.raises(ModelNotFoundError, match="no model named 'tinny'. Did you mean 'tiny'"):
        catalog.pull("tinny")


def test_paths_of_directories_and_files(tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    folder.mkdir()
    with pytest.raises(ModelNotFoundError, match="neither config.json nor a .gguf file"):
        catalog.resolve(folder)
    (folder / "a.gguf").write_bytes(b"GGUF")
    assert catalog.resolve(folder) == folder / "a.gguf"
    (folder / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match="2 GGUF files"):
        catalog.resolve(str(folder))
    (folder / "config.json").write_text("{}")
    assert catalog.resolve(folder) == folder
    assert catalog.resolve(folder / "a.gguf") == folder / "a.gguf"
    monkeypatch.chdir(tmp_path)
    assert catalog.resolve("./tiny") == Path("tiny")
    assert catalog.resolve("tiny") == catalog.BUILTIN / "tiny"  # a name wins over a path
    (folder / "model.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(ModelNotFoundError, match="not a GGUF file; for safetensors, name the directory"):
        catalog.resolve(folder / "model.safetensors")
    (folder / "blob").write_bytes(b"GGUF....")
    assert catalog.resolve(folder / "blob") == folder / "blob"


def test_home_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIPAGED_HOME", "~/here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert catalog.home() == tmp_path / "here"
    monkeypatch.delenv("MINIPAGED_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert catalog.home() == tmp_path / "xdg" / "minipaged"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert catalog.home() == tmp_path / ".cache" / "minipaged"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert catalog.home() == tmp_path / "Library" / "Caches" / "minipaged"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert catalog.home() == tmp_path / "local" / "minipaged"


def test_hub_models_need_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"minipaged\[hub\].*--model tiny"):
        catalog.resolve("hf:org/name")


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:a b/c"])
def test_malformed_hub_names_are_refused(name):
    with pytest.raises(ModelNotFoundError, match="not of the form hf:org/name"):
        catalog.resolve(name)


def test_hub_models_are_asked_for_with_needed_files_only(monkeypatch, tmp_path):
    calls = []

    def snapshot_download(repository, **options):
        calls.append((repository, options))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        catalog.resolve("hf:org/name")
    (tmp_path / "config.json").write_text("{}")
    assert catalog.resolve("hf:org/name@v1.0", pull=False) == tmp_path
    assert catalog.pull("hf:org/name") == tmp_path
    assert [(name, options["revision"], options["local_files_only"]) for name, options in calls] == [
        ("org/name", None, False),
        ("org/name", "v1.0", True),
        ("org/name", None, False),
    ]
    patterns = calls[0][1]["allow_patterns"]
    assert "config.json" in patterns and not any("*" == pattern or pattern.endswith(".bin") for pattern in patterns)


def test_errors_of_the_hub_are_typed(monkeypatch):
    def snapshot_download(repository, **options):
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(DownloadError, match="ConnectionError: no route.*--model tiny"):
        catalog.resolve("hf:org/name")


def test_entries_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        catalog.get_entry("tiny").license = "none"
