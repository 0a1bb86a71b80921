"""Everything is declared in pyproject.toml; the build is pure Python and never imports torch."""

from setuptools import setup

setup()
