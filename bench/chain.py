"""How long the objective of chain training takes: denominator, and both numerators.

``python bench/chain.py [--threads 1] [--sequences 64 128] ...`` makes denominator graphs of the shape that phone
language models have (states are histories of phones; the arcs into one have the forward pdf of its last two phones,
left-biphone, and each has a self-loop) and of about the sizes of real ones, and supervisions of some alternatives a
frame. Outputs are noise. Times are of the objective with its derivative, the median of some rounds:

    denominator      csrc/denominator.c on the CPU, or the device's kernels (--device cuda)
    constrained      prepared, and computed
    cyclic           the same, of unconstrained supervisions

    objective        all of it: denominator, constrained numerator, l2 and the derivatives of both outputs
    step             a whole step of the learner with it (--steps): the TDNN-F of mini_librispeech's run_tdnn_1k.sh

and, if KALDI_ROOT is set and the device is the CPU, a minibatch of nnet3-chain-train on the same graph with a network
that costs next to nothing (kaldi_objective.py): it is to be compared with denominator and constrained numerator.

The last line of standard output is one JSON object: microseconds per output frame (B T of them), of CPU time for
Kaldi, and ours over Kaldi's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from kaldi_objective import kaldi_seconds

from kaldi_mpi.chain.denominator import Denominator
from kaldi_mpi.chain.denominator_graph import DenominatorGraph, denominator_graph
from kaldi_mpi.chain.numerator import prepare_numerator
from kaldi_mpi.chain.objective import ChainOptions, chain_objective
from kaldi_mpi.chain.supervision_graphs import SupervisionGraphs, supervision_graphs
from kaldi_mpi.formats.fst import Fst
from kaldi_mpi.formats.supervision import Supervision
from kaldi_mpi.learner.chain_objective import LfMmi
from kaldi_mpi.learner.faults import Injector
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.objective import DerivativeTimes
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.schedule import ExponentialRate
from kaldi_mpi.learner.state import TrainingState
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.loader import ChainSupervision, ChunkShape, Minibatch
from kaldi_mpi.models import build_model
from kaldi_mpi.models.chance import Chance
from kaldi_mpi.models.xconfig import parse_xconfig_text

PHONES, FRAMES, LEAKY = 40, 50, 0.1
PDFS = 2 * PHONES * PHONES
# States and arcs of the graphs of librispeech's size and of the largest one in public logs.
SIZES = {"6k": (7_000, 60_000), "60k": (58_000, 1_600_000)}


def made_fst(states: int, arcs: int) -> Fst:
    """A denominator graph: state s is a history that ends in phones (left, last); successors begin with `last`.

    Degrees fall as 1 / sqrt(rank), as histories that are often seen have many successors.
    """
    generator = np.random.default_rng(7)
    left, last = np.divmod(generator.permutation(states) % (PHONES * PHONES), PHONES)
    by_left = [np.flatnonzero(left == phone) for phone in range(PHONES)]
    share = 1.0 / np.sqrt(np.arange(1, states + 1))
    wanted = np.maximum(1, (arcs - states) * share / share.sum()).astype(np.int64)
    finals, labels, nexts, costs, first = np.full(states, np.inf, np.float32), [], [], [], [0]
    for state, degree in enumerate(wanted):
        follow = by_left[last[state]]
        chosen = np.sort(generator.choice(follow, min(int(degree), len(follow)), replace=False))
        labels.append(1 + 2 * (left[chosen] * PHONES + last[chosen]))
        labels.append([2 + 2 * (left[state] * PHONES + last[state])])
        nexts.append(np.append(chosen, state))
        costs.append(np.append(-np.log(0.5 * generator.dirichlet(np.ones(len(chosen)))), np.log(2.0)))
        first.append(first[-1] + len(chosen) + 1)
    finals[0] = 1.0
    ilabels = np.concatenate(labels).astype(np.int32)
    return Fst(
        0, finals, np.array(first), ilabels, ilabels, np.concatenate(costs).astype(np.float32),
        np.concatenate(nexts).astype(np.int32),
    )  # fmt: skip


def made_supervisions(count: int, frames: int, cyclic: bool) -> SupervisionGraphs:
    """Alternatives of three pdfs at each frame; cyclic: chains of 40 states, each with a self-loop and 10 arcs on."""
    generator = np.random.default_rng(3)
    found = []
    for _ in range(count):
        states, width = (40, 10) if cyclic else (1 + 3 * frames, 3)
        arcs: list[list[tuple[int, float, int]]] = []
        for state in range(states):
            begin = 1 + (state + 2) // 3 * 3 if not cyclic else state + 1
            nexts = [n for n in range(begin, begin + width) if n < states]
            if cyclic:
                nexts = [state, *nexts]
            arcs.append([(int(generator.integers(1, PDFS + 1)), float(generator.uniform(0, 5)), n) for n in nexts])
        flat = [arc for of_state in arcs for arc in of_state]
        finals = np.array([np.inf if of_state and not cyclic else 0.0 for of_state in arcs], dtype=np.float32)
        labels = np.array([label for label, _, _ in flat], dtype=np.int32)
        fst = Fst(
            0, finals, np.cumsum([0, *map(len, arcs)]), labels, labels,
            np.array([cost for _, cost, _ in flat], dtype=np.float32),
            np.array([following for _, _, following in flat], dtype=np.int32),
        )  # fmt: skip
        found.append(Supervision(1.0, 1, frames, PDFS, cyclic, (fst,)))
    return supervision_graphs(found)


def median_time(rounds: int, device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of a call; the first, in which memory is found, does not count."""
    times = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(graph: DenominatorGraph, sequences: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Microseconds per output frame."""
    generator = torch.Generator().manual_seed(1)
    outputs = (2.0 * torch.randn(sequences, FRAMES, PDFS, generator=generator)).to(device)
    derivative, denominator = torch.empty_like(outputs), Denominator(graph, LEAKY)
    found = {
        "denominator": median_time(rounds, device, lambda: denominator(outputs, derivative)),
        "denominator_objective_only": median_time(rounds, device, lambda: denominator(outputs)),
    }
    for name, cyclic in (("constrained", False), ("cyclic", True)):
        graphs = made_supervisions(sequences, FRAMES, cyclic)
        found[f"{name}_prepared"] = median_time(rounds, device, functools.partial(prepare_numerator, graphs, PDFS))
        numerator = prepare_numerator(graphs, PDFS)
        found[name] = median_time(rounds, device, functools.partial(numerator.sums, outputs))
        if not cyclic:
            options = ChainOptions(5e-5, 0.1, LEAKY)
            whole = functools.partial(chain_objective, denominator, numerator, outputs, options, xent=outputs)
            found["objective"] = median_time(rounds, device, whole)
    return {name: round(1e6 * seconds / (sequences * FRAMES), 3) for name, seconds in found.items()}


def xconfig() -> str:
    """The network of mini_librispeech/s5/local/chain/tuning/run_tdnn_1k.sh without i-vectors and dropout."""
    l2 = "l2-regularize=0.03"
    layers = "".join(
        f"tdnnf-layer name=tdnnf{n} {l2} bypass-scale=0.66 dim=768 bottleneck-dim=96 time-stride={stride}\n"
        for n, stride in enumerate((1, 1, 1, 0, *(3 for _ in range(8))), 2)
    )
    ends = "".join(
        f"prefinal-layer name=prefinal-{name} input=prefinal-l {l2} small-dim=192 big-dim=768\n{output}"
        for name, output in (
            ("chain", f"output-layer name=output include-log-softmax=false dim={PDFS} l2-regularize=0.015\n"),
            ("xent", f"output-layer name=output-xent dim={PDFS} learning-rate-factor=5.0 l2-regularize=0.015\n"),
        )
    )
    return (
        f"input dim=40 name=input\nrelu-batchnorm-layer name=tdnn1 {l2} dim=768 input=Append(-1,0,1)\n{layers}"
        f"linear-component name=prefinal-l dim=192 {l2} orthonormal-constraint=-1.0\n{ends}"
    )


def step_time(graph: DenominatorGraph, sequences: int, device: torch.device, rounds: int) -> float:
    """Microseconds an output frame of a learner's step, objective, natural gradient and update included."""
    model = build_model(parse_xconfig_text(xconfig()), seed=0).to(device)
    model.use_natural_gradient()
    model.train()
    model.mode.chance = Chance(0, 0)
    flat = FlatParameters.of_model(model)
    shape = ChunkShape(FRAMES, model.left_context + 1, model.right_context + 3, subsampling=3)
    graphs = made_supervisions(sequences, FRAMES, False)
    names = ("first_state", "first_sequence", "first_arc", "finals", "pdfs", "costs", "nexts")
    arrays = {name: torch.from_numpy(np.ascontiguousarray(getattr(graphs, name))) for name in names}
    supervision = ChainSupervision(1.0, FRAMES, PDFS, False, **arrays)
    feats = torch.randn(sequences, shape.rows, 40, generator=torch.Generator().manual_seed(2)).to(device)
    frames = sequences * FRAMES
    labels = torch.zeros(sequences, 0, dtype=torch.int64)
    batch = Minibatch(feats, labels, frames, frames, float(frames), 0, 0, shape, supervision=supervision)
    rate = ExponentialRate(1e-6, 1e-6, 10**9)
    with tempfile.TemporaryDirectory() as name:
        learner = LearnerStep(
            TrainingState(model, flat, KaldiSgd(flat, 0.0, 2.0), []),
            rate,
            1,
            DerivativeTimes(),
            TrainingLog(Path(name), 0, rate, 1.0),
            Injector((), 0),
            objective=LfMmi(Denominator(graph, LEAKY), ChainOptions(0.0, 0.1, LEAKY)),
        )

        def step() -> None:
            learner.begin(batch, sequences)
            learner.compute(batch)
            learner.update(None, together=False)

        return round(1e6 * median_time(rounds, device, step) / frames, 1)


def main() -> None:
    """Time, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequences", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=2, help="of the learner that are timed; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, object] = {"threads": options.threads, "frames": FRAMES, "device": options.device}
    for size in options.sizes:
        fst = made_fst(*SIZES[size])
        graph = denominator_graph(fst, PDFS)
        for sequences in options.sequences:
            found = measure(graph, sequences, torch.device(options.device), options.rounds)
            if options.steps:
                found["step"] = step_time(graph, sequences, torch.device(options.device), options.steps)
                objective = found["objective"] + found["constrained_prepared"]
                found["objective_share_of_step"] = round(objective / found["step"], 4)
            if "KALDI_ROOT" in os.environ and options.device == "cpu":
                root = Path(os.environ["KALDI_ROOT"])
                seconds = kaldi_seconds(root, fst, PDFS, sequences, FRAMES, LEAKY)
                found["kaldi"] = round(1e6 * seconds / (sequences * FRAMES), 3)
                ours = found["denominator"] + found["constrained"]
                found["kaldi_over_ours"] = round(found["kaldi"] / ours, 2)
            print(f"\n{graph.num_states} states, {graph.num_arcs} arcs, {sequences} sequences: microseconds a frame")
            for name, value in found.items():
                print(f"  {name:28}{value:10.2f}")
            result[f"{size}, {sequences}"] = found
    print(json.dumps(result))


if __name__ == "__main__":
    main()
