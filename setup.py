"""Build of the C extensions; everything else stands in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=[f"csrc/build_csrc.py:{name}" for name in ("loader", "models", "chain")])
