"""Which stages are left to do, against the conditions of Kaldi's steps/nnet3/train_*.py."""

from __future__ import annotations

import itertools

import pytest

from kaldi_mpi.learner.options import read
from kaldi_mpi.learner.stages import stages_to_do

ITERATIONS = 5


@pytest.mark.parametrize("program", ["rnn", "raw-dnn"])
@pytest.mark.parametrize("model", ["", "some.raw"])
def test_what_is_left(program: str, model: str) -> None:
    raw = program.startswith("raw")
    data = "--targets-scp=t" if raw else "--ali-dir=a"
    for stage, leave, combines in itertools.product(range(-6, 9), (None, -1, 0, 3, 5, 9), ("true", "false")):
        words = [f"--program={program}", "--feat-dir=f", "--dir=d", data, f"--stage={stage}"]
        words += [f"--trainer.input-model={model}", f"--trainer.optimization.do-final-combination={combines}"]
        words += ["--compute-average-posteriors=true"] if raw else []
        words += [f"--exit-stage={leave}"] if leave is not None else []
        stages = stages_to_do(read(words)[0], ITERATIONS)

        # The order of work of Kaldi's programs, with its conditions.
        done = []
        if stage <= (-2 if raw else -3) and not model:
            done.append("lda")
        if not raw and stage <= -2 and not model:
            done.append("prior scale")
        if stage <= -1:
            done.append("initial")
        for iteration in range(ITERATIONS):
            if leave is not None and iteration == leave:
                break
            if stage <= iteration:
                done.append(str(iteration))
        else:
            if stage <= ITERATIONS and combines == "true":
                done.append("combine")
            if stage <= ITERATIONS + 1:
                done.append("priors")

        named = {"lda": stages.lda, "prior scale": stages.prior_scale, "initial": stages.initial}
        ours = [name for name, on in named.items() if on]
        ours += [str(n) for n in range(stages.first_iteration, stages.end_iteration)]
        ours += [name for name, on in (("combine", stages.combine), ("priors", stages.priors)) if on]
        assert ours == done, words
        assert stages.exits == (leave in (0, 3))


def test_average_output_of_a_raw_network_is_on_demand() -> None:
    words = ["--program=raw-rnn", "--feat-dir=f", "--dir=d", "--targets-scp=t"]
    assert not stages_to_do(read(words)[0], ITERATIONS).priors
