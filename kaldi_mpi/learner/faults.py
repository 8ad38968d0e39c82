"""Disturbances on purpose: slow, jittery, paused or killed learners, to see what a strategy makes of them.

``--inject "device:20ms,slow:100x@rank2,jitter:30%,pause:5s@rank1@step50,kill@rank3@step100"``

    device:T      every step takes T more, in which the core is free: a stand-in for an accelerator
    slow:Fx       every step takes F times as long (device time included)
    jitter:P%     every step takes up to P per cent longer, at random
    pause:T@stepK once, before the learner's own step K
    kill@stepK    the process kills itself before its own step K

``@rankR`` restricts a disturbance to one learner; kill needs one. Times are in s or ms.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Sequence

import numpy as np

from kaldi_mpi.errors import ConfigError

_KINDS = {"device": r"([\d.]+)(ms|s)", "slow": r"([\d.]+)x", "jitter": r"([\d.]+)%", "pause": r"([\d.]+)(ms|s)"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One entry of the list: `amount` is in seconds, a factor, or a share."""

    kind: str
    amount: float
    rank: int | None
    step: int | None


def parse_faults(text: str) -> list[Fault]:
    """The disturbances of an ``--inject`` option.

    Raises:
        ConfigError: an entry is malformed; names it.
    """
    return [_parse_one(entry.strip()) for entry in text.split(",") if entry.strip()]


def _parse_one(entry: str) -> Fault:
    what, *where = entry.split("@")
    kind, _, amount = what.partition(":")
    places: dict[str, int | None] = {"rank": None, "step": None}
    for place in where:
        match = re.fullmatch(r"(rank|step)(\d+)", place)
        if match is None:
            raise ConfigError(f"--inject {entry}: '@{place}' is neither @rankR nor @stepK")
        places[match[1]] = int(match[2])
    if kind == "kill" and not amount:
        value = 0.0
    else:
        match = re.fullmatch(_KINDS.get(kind, r"(?!)"), amount)
        if match is None:
            raise ConfigError(
                f"--inject {entry}: expected device:20ms, slow:100x, jitter:30%, pause:5s or kill, with @rankR, @stepK"
            )
        unit = match[2] if match.lastindex == 2 else ""
        value = float(match[1]) * {"ms": 1e-3, "%": 1e-2}.get(unit or amount[-1], 1.0)
    once = kind in ("pause", "kill")
    if once != (places["step"] is not None) or (kind == "kill" and places["rank"] is None):
        raise ConfigError(f"--inject {entry}: {kind} {'needs @stepK' if once else 'takes no @stepK'}"
                          + (" and @rankR" if kind == "kill" else ""))  # fmt: skip
    if kind == "slow" and value < 1:
        raise ConfigError(f"--inject {entry}: a factor below 1 cannot be had")
    return Fault(kind, value, places["rank"], places["step"])


class Injector:
    """Disturbs the steps of one learner: call `begin` before each step and `end` after its computation.

    Args:
        faults: from `parse_faults`; those of other ranks have no effect here.
        rank: this learner.
        sleep, clock: in seconds.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        rank: int,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        mine = [d for d in faults if d.rank in (None, rank)]
        self._device = sum(d.amount for d in mine if d.kind == "device")
        self._factor = float(np.prod([d.amount for d in mine if d.kind == "slow"]))
        self._jitter = sum(d.amount for d in mine if d.kind == "jitter")
        self._once = [d for d in mine if d.step is not None]
        self._rng = np.random.default_rng([rank, 0x6A6974])
        self._rank, self._sleep, self._clock = rank, sleep, clock
        self._steps = 0
        self._began = 0.0

    def begin(self) -> None:
        """A step begins."""
        for d in self._once:
            if d.step == self._steps and d.kind == "pause":
                self._sleep(d.amount)
            elif d.step == self._steps:
                os.kill(os.getpid(), signal.SIGKILL)
        self._steps += 1
        self._began = self._clock()

    def end(self) -> None:
        """Its computation is done: take the time that it is to take."""
        if not (self._device or self._jitter or self._factor > 1):
            return
        took = self._clock() - self._began
        factor = self._factor * (1.0 + self._jitter * self._rng.random())
        rest = (took + self._device) * factor - took
        if rest > 0:
            self._sleep(rest)
