"""Build of minipaged; metadata and tool settings are in pyproject.toml."""

from setuptools import setup

setup()
