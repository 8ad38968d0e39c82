"""The options of Kaldi's apply-cmvn, as its scripts keep them in a file ``cmvn_opts`` beside a model."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.options import boolean, kaldi_options


class CmvnOptions(NamedTuple):
    """What apply-cmvn is told; the defaults are its own.

    Attributes:
        norm_means: subtract the speaker's mean.
        norm_vars: scale to unit variance too.
        skip_dims: columns that are left as they are.
    """

    norm_means: bool = True
    norm_vars: bool = False
    skip_dims: tuple[int, ...] = ()


def parse_cmvn_opts(text: str, *, where: str = "cmvn_opts") -> CmvnOptions:
    """Take apart what a file ``cmvn_opts`` of Kaldi holds, for example ``--norm-means=true --skip-dims=13:14``.

    Args:
        text: the options; none of them gives apply-cmvn's own defaults, which normalise means.
        where: what to call the text in errors.

    Raises:
        ConfigError: an option that apply-cmvn does not have, or a value that it would not take; ``--reverse``,
            which is for synthesis.
    """
    found = kaldi_options(text, ("norm-means", "norm-vars", "reverse", "skip-dims"), where)
    flags = {}
    for name, default in (("norm-means", "true"), ("norm-vars", "false"), ("reverse", "false")):
        try:
            flags[name] = boolean(found.get(name, default))
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"{where}: --{name}: {error}") from None
    if flags["reverse"]:
        raise ConfigError(f"{where}: --reverse=true undoes normalisation, and is of no use in training")
    dims = [dim for dim in found.get("skip-dims", "").split(":") if dim]
    if not all(dim.isascii() and dim.isdecimal() and len(dim) < 9 for dim in dims):
        raise ConfigError(f"{where}: --skip-dims is {found['skip-dims']!r}, and must be like 13:14:15")
    return CmvnOptions(flags["norm-means"], flags["norm-vars"], tuple(int(dim) for dim in dims))


def format_cmvn_opts(options: CmvnOptions) -> str:
    """The same as one line, without its end: ``--norm-means=true --norm-vars=false --skip-dims=13:14``."""
    words = [f"--norm-means={str(options.norm_means).lower()}", f"--norm-vars={str(options.norm_vars).lower()}"]
    if options.skip_dims:
        words.append(f"--skip-dims={':'.join(map(str, options.skip_dims))}")
    return " ".join(words)
