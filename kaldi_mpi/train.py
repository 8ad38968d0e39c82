"""``mpiexec -n N python -m kaldi_mpi.train ...``: one learner a rank, from options to final.mdl."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from kaldi_mpi import log
from kaldi_mpi.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank; returns 0 when the training is done (a failure ends all ranks with status 1)."""
    # MPI starts with the import, and only here: everything else of the package works without it.
    from kaldi_mpi.learner.options import parse
    from kaldi_mpi.learner.run import train
    from kaldi_mpi.transport.guard import guarded
    from kaldi_mpi.transport.mpi import MpiWorld, die_with_parent

    die_with_parent()
    log.set_up("kaldi-mpi-train")
    try:
        world = MpiWorld()
    except ConfigError as error:
        log.logger.error("%s", error)
        return 1
    log.set_up("kaldi-mpi-train", world.rank, logging.INFO if world.rank == 0 else logging.WARNING)
    with guarded(world):
        if world.rank == 0:
            log.logger.info("%s", " ".join(["kaldi_mpi.train", *(sys.argv[1:] if arguments is None else arguments)]))
        train(parse(arguments), world)
        world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
