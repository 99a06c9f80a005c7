"""The C library, built from this checkout once a session."""

from __future__ import annotations

import pytest

from minipaged import LLM
from tests.support.capi import Api, Build


@pytest.fixture(scope="session")
def build(tmp_path_factory) -> Build:
    return Build(tmp_path_factory.mktemp("capi"))


@pytest.fixture(scope="session")
def api(build) -> Api:
    return Api(build.library)


@pytest.fixture(scope="module")
def engine(api):
    """One engine for the tests of a file; each leaves it without requests."""
    handle = api.create()
    yield handle
    api.check(api.engine_destroy(handle))


@pytest.fixture(scope="module")
def llm():
    """The same model from Python."""
    with LLM("tiny-draft", device="reference", num_blocks=256) as llm:
        yield llm
