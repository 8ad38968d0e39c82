"""Build of the C extensions; everything else stands in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["csrc/build_csrc.py:loader", "csrc/build_csrc.py:models"])
