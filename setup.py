"""Build of the C extension; everything else stands in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["csrc/build_csrc.py:ffibuilder"])
