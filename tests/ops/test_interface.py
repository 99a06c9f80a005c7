"""A backend has every operator of the interface, with the same parameters."""

from __future__ import annotations

import inspect

import pytest

from minipaged.ops.interface import Ops
from minipaged.ops.reference import ReferenceOps

OPERATORS = [name for name in vars(Ops) if not name.startswith("_")]


@pytest.mark.parametrize("name", OPERATORS)
def test_reference_has_the_operator(name):
    wanted = [p for p in inspect.signature(getattr(Ops, name)).parameters.values() if p.name != "self"]
    found = list(inspect.signature(getattr(ReferenceOps(), name)).parameters.values())
    assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in wanted]


def test_the_interface_is_complete():
    extra = [name for name in vars(ReferenceOps) if not name.startswith("_") and name not in OPERATORS]
    assert not extra
