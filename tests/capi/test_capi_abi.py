"""The binary interface: what was published stays as it is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "capi" / "abi"))
sys.path.insert(0, str(ROOT / "capi"))

import build_capi  # noqa: E402
import record  # noqa: E402

pytestmark = pytest.mark.skipif(sys.maxsize < 2**32, reason="the records are of 64-bit machines")


def records() -> list[dict]:
    """All published versions, the oldest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in record.ABI.glob("*.json")]
    return sorted(found, key=lambda r: [int(part) for part in r["version"].split(".")])


def extends(older: dict, newer: dict) -> list[str]:
    """What a program built with ``older`` would miss in ``newer``."""
    missing = [
        f"{kind} {name}"
        for kind in ("functions", "callbacks", "constants")
        for name, value in older[kind].items()
        if newer[kind].get(name) != value
    ]
    for name, struct in older["structs"].items():
        fields = newer["structs"].get(name, {"fields": {}})["fields"]
        missing += [f"{name}.{field}" for field, place in struct["fields"].items() if fields.get(field) != place]
    return missing


def test_the_header_is_what_was_recorded_for_its_version():
    current = record.describe(build_capi.header_text())
    assert record.path_of(current).exists(), "a new version of the interface: run python capi/abi/record.py"
    recorded = json.loads(record.path_of(current).read_text(encoding="utf-8"))
    assert current == recorded, "the interface changed: raise MINIPAGED_API_MINOR (additions) or MAJOR (changes)"
    assert len(current["functions"]) == len(build_capi.exports()) >= 29


def test_minor_versions_only_add():
    published = records()
    for older, newer in zip(published, published[1:], strict=False):
        if older["soname"] == newer["soname"]:
            assert extends(older, newer) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("int32_t n;          /* choices", "int64_t n;          /* choices"),
        ("#define MINIPAGED_ERROR_BUSY (-8) ", "#define MINIPAGED_ERROR_BUSY (-9) "),
        (
            "int32_t minipaged_cancel(minipaged_engine *engine",
            "int32_t minipaged_cancel(const minipaged_engine *engine",
        ),
        ("int32_t minipaged_engine_step(", "int32_t minipaged_engine_do_step("),
        ("    int32_t auto_free;", "    int32_t more;\n    int32_t auto_free;"),
    ],
)
def test_a_change_is_noticed(old, new):
    header = build_capi.header_text()
    assert header.count(old) == 1
    before, after = record.describe(header), record.describe(header.replace(old, new))
    assert before != after and extends(before, after)


def test_the_library_exports_the_functions_of_the_header_and_nothing_else(build):
    nm = shutil.which("nm")
    if not nm:
        pytest.skip("nm is not installed")
    text = subprocess.run([nm, "-D", "--defined-only", build.library], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1].partition("@")[0] for line in text.stdout.splitlines() if " T " in line}
    assert symbols == set(records()[-1]["functions"])
    dynamic = subprocess.run(["readelf", "-d", build.library], capture_output=True, text=True, check=True).stdout
    assert f"[{records()[-1]['soname']}]" in re.search(r"SONAME.*", dynamic)[0]


def test_the_compiler_lays_structs_out_as_recorded(build, tmp_path):
    lines = ["#include <minipaged.h>", "#include <stddef.h>"]
    for name, struct in records()[-1]["structs"].items():
        lines.append(f'_Static_assert(sizeof({name}) == {struct["size"]}, "{name}");')
        for field, (offset, _, _) in struct["fields"].items():
            lines.append(f'_Static_assert(offsetof({name}, {field}) == {offset}, "{name}.{field}");')
    (tmp_path / "layout.c").write_text("\n".join([*lines, "int main(void) { return 0; }", ""]))
    subprocess.run(["cc", "-std=c11", f"-I{build.include}", "-c", "layout.c"], cwd=tmp_path, check=True)


def test_init_macros_give_the_defaults(build, api, tmp_path):
    """The bytes of each INIT macro are those that the tests' own defaults have."""
    body = "".join(
        f"{{ minipaged_{name} s = MINIPAGED_{name.upper()}_INIT; fwrite(&s, 1, sizeof s, stdout); }}\n"
        for name in api.defaults
    )
    (tmp_path / "init.c").write_text(
        f"#include <minipaged.h>\n#include <stdio.h>\nint main(void) {{\n{body}return 0; }}\n"
    )
    done = build.run(build.compile(tmp_path / "init.c"), text=False, errors=None)
    assert done.stdout == b"".join(bytes(api.ffi.buffer(default)) for default in api.defaults.values())


def test_every_status_has_a_name(api):
    names = {name: int(value.strip("()")) for name, value in records()[-1]["constants"].items() if "ERROR_" in name}
    statuses = {n: v for n, v in names.items() if n != "MINIPAGED_LOG_ERROR" and n != "MINIPAGED_FINISH_ERROR"}
    for name, status in statuses.items():
        assert api.ffi.string(api.status_name(status)).decode() == name
    for status in (min(statuses.values()) - 1, 3, 2**31 - 1, -(2**31)):
        assert api.ffi.string(api.status_name(status)) == b"unknown status"
    assert len(set(statuses.values())) == len(statuses)


def test_versions_need_no_interpreter(api):
    major, minor, patch = build_capi.api_version()
    assert api.api_version() == major * 1_000_000 + minor * 1000 + patch
    assert api.ffi.string(api.version()).decode() == build_capi.package_version()


def test_the_documentation_of_the_header_is_complete(api):
    """Every exported function is explained right above it, with its errors."""
    header = build_capi.header_text()
    for function in api.functions:
        head = header[: re.search(rf"^\w[^\n]*\b{function}\(", header, re.MULTILINE).start()].rstrip()
        assert head.endswith(("*/", ";")), f"{function} has no text above it"


def test_the_header_compiles_alone(build, tmp_path):
    (tmp_path / "a.c").write_text("#include <minipaged.h>\nint main(void) { return 0; }\n")
    for command in (["cc", "-std=c99"], ["cc", "-std=c11"], ["c++", "-x", "c++", "-std=c++98"], ["c++", "-x", "c++"]):
        flags = ["-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{build.include}", "-fsyntax-only", "a.c"]
        subprocess.run([*command, *flags], cwd=tmp_path, check=True)
    (tmp_path / "b.cpp").write_text("#include <minipaged.hpp>\nint main() {}\n")
    for standard in ("c++17", "c++20"):
        flags = ["-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{build.include}", "-fsyntax-only", "b.cpp"]
        subprocess.run(["c++", f"-std={standard}", *flags], cwd=tmp_path, check=True)


def test_exports_are_found_in_the_header():
    assert Path(build_capi.CAPI / "include" / "minipaged.h").exists()
    assert {"minipaged_wait", "minipaged_error", "minipaged_set_log_callback"} <= set(build_capi.exports())
