"""The binary interface as data: what the header declares, with sizes and offsets.

    python capi/abi/record.py        compare with the record of this version; write it if there is none yet

A record never changes once it is published: whatever the header adds needs a higher MINOR (and a new record),
whatever it changes or removes a higher MAJOR. ``tests/capi/test_capi_abi.py`` holds it to that.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import cffi

ABI = Path(__file__).resolve().parent
sys.path.insert(0, str(ABI.parent))

import build_capi  # noqa: E402


def describe(header: str) -> dict:
    """Functions with their types, structs with sizes and offsets, constants with values."""
    ffi = cffi.FFI()
    declarations = build_capi.declarations(header)
    ffi.cdef(declarations)
    structs = {}
    for name in re.findall(r"^\} (minipaged_\w+);", header, re.MULTILINE):
        kind = ffi.typeof(name)
        fields = {field: [info.offset, ffi.sizeof(info.type), ffi.getctype(info.type)] for field, info in kind.fields}
        structs[name] = {"size": ffi.sizeof(name), "fields": fields}
    # Type names as the header spells them, one line a function.
    text = " ".join(re.sub(r"/\*.*?\*/", "", declarations, flags=re.DOTALL).split())
    functions = {m[2]: f"{m[1].strip()} {m[2]}({m[3]})" for m in re.finditer(_FUNCTION, text)}
    callbacks = {m[2]: f"{m[1].strip()} (*{m[2]})({m[3]})" for m in re.finditer(_CALLBACK, text)}
    return {
        "version": ".".join(str(part) for part in build_capi.api_version()[:2]),
        "soname": build_capi.soname(),
        "functions": functions,
        "callbacks": callbacks,
        "structs": structs,
        "constants": {name: value for name, value in re.findall(_CONSTANT, header, re.MULTILINE)},
    }


_FUNCTION = r"(?:^|(?<=; ))((?:const )?\w+ \*?)(minipaged_\w+)\(([^;]*?)\);"
_CALLBACK = r"typedef ([\w ]+?) ?\(\*(minipaged_\w+)\)\(([^;]*?)\);"
_CONSTANT = r"^#define (MINIPAGED_(?!API_)\w+) +(\(.+?\)|-?\d+)(?: *$| +/\*)"


def path_of(description: dict) -> Path:
    return ABI / f"{description['version']}.json"


def main() -> str | None:
    current = describe(build_capi.header_text())
    path = path_of(current)
    if not path.exists():
        path.write_text(json.dumps(current, indent=1) + "\n", encoding="utf-8")
        return None
    if json.loads(path.read_text(encoding="utf-8")) != current:
        return f"the header differs from {path.name}: raise MINIPAGED_API_MINOR (additions) or MAJOR (changes)"
    return None


if __name__ == "__main__":
    sys.exit(main())
