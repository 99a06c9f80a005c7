"""A hundred JSON schemas: fifty whose texts are of bounded length, fifty with something unbounded in them."""

from __future__ import annotations

import random

KEYS = ["name", "age", "größe", "名前", "a b", 'say "hi"', "x\\y", "émoji 😀", "id", "tags"]
WORDS = ["yes", "no", "König", "東京", "😀🙃", 'quo"te', "back\\slash", "tab\tand\nline", "", " "]


def schemas() -> list[tuple[str, dict]]:
    """``(name, schema)``; the names of the bounded ones begin with ``"bounded"``."""
    found = []
    for number in range(50):
        rng = random.Random(number)
        found.append((f"bounded {number}", _object(rng, 2, _bounded_leaf)))
        found.append((f"unbounded {number}", _unbounded(rng, number)))
    return found


def _object(rng: random.Random, depth: int, leaf) -> dict:
    """An object, nested ``depth`` deep, some of its properties optional."""
    keys = rng.sample(KEYS, rng.randint(1, 3))
    properties = {key: _value(rng, depth - 1, leaf) for key in keys}
    required = [key for key in keys if rng.random() < 0.8]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(rng: random.Random, depth: int, leaf) -> dict:
    kind = rng.randrange(5) if depth else 0
    if kind <= 1:
        return leaf(rng)
    if kind == 2:
        low = rng.randint(0, 2)
        return {"type": "array", "items": leaf(rng), "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == 3:
        return {"anyOf": [leaf(rng), {"type": "null"}]}
    return _object(rng, depth, leaf)


def _bounded_leaf(rng: random.Random) -> dict:
    low = rng.randint(-1000, 1000)
    return rng.choice(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"const": rng.choice(WORDS)},
            {"enum": rng.sample([*WORDS, 1, -2.5, None, True], rng.randint(1, 4))},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 10**6)},
            {"type": "integer", "exclusiveMinimum": 0, "maximum": 9},
            {"type": "string", "maxLength": rng.randint(0, 12)},
            {"type": "string", "minLength": 2, "maxLength": 5},
            {"type": "string", "pattern": r"^[A-Z]{2}-\d{1,4}$"},
            {"type": "string", "format": "date"},
        ]
    )


def _unbounded_leaf(rng: random.Random) -> dict:
    return rng.choice(
        [
            {"type": "string"},
            {"type": "string", "minLength": 3},
            {"type": "string", "pattern": "^(ab|c)+$"},
            {"type": "integer"},
            {"type": "number"},
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            {"type": "array", "items": {"type": "integer"}},
            {"type": "object", "additionalProperties": {"type": "boolean"}},
            {},
        ]
    )


def _unbounded(rng: random.Random, number: int) -> dict:
    kind = number % 5
    if kind == 0:  # a tree
        node = {
            "type": "object",
            "properties": {
                "value": _unbounded_leaf(rng),
                "children": {"type": "array", "items": {"$ref": "#/$defs/n"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
        return {"$ref": "#/$defs/n", "$defs": {"n": node}}
    if kind == 1:
        return {"type": "array", "items": _object(rng, 1, _unbounded_leaf), "minItems": 1}
    if kind == 2:
        return {"type": "array", "prefixItems": [_unbounded_leaf(rng), _bounded_leaf(rng)], "items": {"type": "string"}}
    return _object(rng, 2, _unbounded_leaf)
