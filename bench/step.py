"""The learner's step beside a bare PyTorch loop of the same network, data in memory; and what natural gradient costs.

The step is the one that ships (`LearnerStep`: gradient, objective, limits, statistics, self-repair, constraint), of a
learner. The bare loop is what one would write: torch.nn modules, `loss.backward()`, `torch.optim.SGD`. Its LSTM has the
peepholes of nnet3, as a loop over time; torch.nn.LSTM, which cannot have them, is timed beside it. All arms take
turns in one process; the figures are medians over rounds of frames per second, and of the ratios within a round. The
last line is one JSON object.

With --kaldi WORK (and KALDI_ROOT): the whole training instead, two learners under `periodic` beside two jobs of Kaldi's
train_rnn.py on the same examples of the LSTM of kaldi_training.py, in turns, averaging after 70 000 and after 16 000
frames of both together. Its time is that between the models of two iterations, which both write.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # as the launcher of learners sets it, before NumPy looks

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kaldi_training

from kaldi_mpi.learner.faults import Injector
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.objective import DerivativeTimes
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.run import settle_process
from kaldi_mpi.learner.schedule import ExponentialRate
from kaldi_mpi.learner.state import TrainingState
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.loader import ChunkShape, Minibatch
from kaldi_mpi.models import build_model
from kaldi_mpi.models.chance import Chance
from kaldi_mpi.models.xconfig import parse_xconfig_text

FEATS, PDFS, RATE = 40, 600, 1e-5
LSTM_CELLS, LSTM_LAYERS = 256, 2
# Chunks of a minibatch and their width: small ones, and those of mini_librispeech/s5/local/chain/tuning/run_tdnn_1j.sh,
# whose 140 frames are 47 at a third of the rate.
SMALL, RECIPES = (32, 20), (64, 47)
PERIODS = (70_000, 16_000)  # frames between averages
TDNNF_DIM, TDNNF_BOTTLENECK, TDNNF_STRIDES = 512, 96, (1, 1, 3, 3)


def lstm_xconfig() -> str:
    """As lstm.py below."""
    layers = "".join(f"fast-lstm-layer name=l{n} cell-dim={LSTM_CELLS} delay=-1\n" for n in range(LSTM_LAYERS))
    return f"input dim={FEATS} name=input\n{layers}output-layer name=output dim={PDFS} max-change=1.5\n"


def tdnnf_xconfig() -> str:
    """As `TdnnF` below."""
    layers = "".join(
        f"tdnnf-layer name=f{n} dim={TDNNF_DIM} bottleneck-dim={TDNNF_BOTTLENECK} time-stride={stride}\n"
        for n, stride in enumerate(TDNNF_STRIDES)
    )
    first = f"relu-batchnorm-layer name=a dim={TDNNF_DIM} input=Append(-1,0,1)\n"
    return f"input dim={FEATS} name=input\n{first}{layers}output-layer name=output dim={PDFS} max-change=1.5\n"


class PeepholeLstm(nn.Module):
    """One layer, step by step: what torch.nn has no module for."""

    def __init__(self, inputs: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.of_input, self.of_output = nn.Linear(inputs, 4 * cells), nn.Linear(cells, 4 * cells, bias=False)
        self.peepholes = nn.Parameter(torch.randn(3, cells) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(frames, B, inputs) -> (frames, B, cells)."""
        c = h = x.new_zeros(x.shape[1], self.cells)
        w_i, w_f, w_o = self.peepholes
        out = []
        for row in self.of_input(x).unbind(0):
            i, f, g, o = (row + self.of_output(h)).chunk(4, dim=1)
            c = torch.sigmoid(f + c * w_f) * c + torch.sigmoid(i + c * w_i) * torch.tanh(g)
            h = torch.sigmoid(o + c * w_o) * torch.tanh(c)
            out.append(h)
        return torch.stack(out)


class Lstm(nn.Module):
    """Layers of `PeepholeLstm`, or one torch.nn.LSTM."""

    def __init__(self, peepholes: bool) -> None:
        super().__init__()
        if peepholes:
            self.layers: nn.Module = nn.Sequential(
                *(PeepholeLstm(LSTM_CELLS if n else FEATS, LSTM_CELLS) for n in range(LSTM_LAYERS))
            )
        else:
            self.layers = nn.LSTM(FEATS, LSTM_CELLS, LSTM_LAYERS)
        self.output = nn.Linear(LSTM_CELLS, PDFS)

    def forward(self, feats: Tensor, width: int) -> Tensor:
        """(B, frames, FEATS) -> log-probabilities of the last `width` frames, (width, B, PDFS)."""
        hidden = self.layers(feats.transpose(0, 1))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.output(hidden[-width:]).log_softmax(-1)


class TdnnF(nn.Module):
    """Factorised layers over frames: `linear` sees t - s and t, `affine` sees t and t + s; a bypass of 0.66."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(FEATS, TDNNF_DIM, 3)
        self.norm = nn.BatchNorm1d(TDNNF_DIM, affine=False)
        self.linear = nn.ModuleList(
            nn.Conv1d(TDNNF_DIM, TDNNF_BOTTLENECK, 2, dilation=s, bias=False) for s in TDNNF_STRIDES
        )
        self.affine = nn.ModuleList(nn.Conv1d(TDNNF_BOTTLENECK, TDNNF_DIM, 2, dilation=s) for s in TDNNF_STRIDES)
        self.norms = nn.ModuleList(nn.BatchNorm1d(TDNNF_DIM, affine=False) for _ in TDNNF_STRIDES)
        self.output = nn.Linear(TDNNF_DIM, PDFS)

    def forward(self, feats: Tensor, width: int) -> Tensor:
        """(B, frames, FEATS) -> log-probabilities, (B, width, PDFS)."""
        x = self.norm(torch.relu(self.first(feats.transpose(1, 2))))
        for s, linear, affine, norm in zip(TDNNF_STRIDES, self.linear, self.affine, self.norms, strict=True):
            x = norm(torch.relu(affine(linear(x)))) + 0.66 * x[:, :, s:-s]
        return self.output(x.transpose(1, 2)).log_softmax(-1)


class Arm:
    """Something that takes a minibatch and moves a model."""

    def __init__(self, take: Callable[[Minibatch[Tensor]], None]) -> None:
        self.take = take

    def frames_per_second(self, batches: list[Minibatch[Tensor]]) -> float:
        """Of labelled frames, over these minibatches."""
        began = time.perf_counter()
        for batch in batches:
            self.take(batch)
        return sum(batch.frames for batch in batches) / (time.perf_counter() - began)


def learner(xconfig: str, natural_gradient: bool, folder: Path) -> tuple[Arm, tuple[int, int]]:
    """Our step, and the network's contexts."""
    model = build_model(parse_xconfig_text(xconfig), seed=0)
    flat = FlatParameters.of_model(model)
    if natural_gradient:
        model.use_natural_gradient()
    model.mode.chance = Chance(0, 0)
    model.train()
    rate = ExponentialRate(RATE, RATE / 10, 10**9)
    state = TrainingState(model, flat, KaldiSgd(flat, 0.5, 2.0), [])
    step = LearnerStep(state, rate, 1, DerivativeTimes(), TrainingLog(folder, 0, rate, 1.0), Injector((), 0))

    def take(batch: Minibatch[Tensor]) -> None:
        step.begin(batch, len(batch.labels))
        step.compute(batch)
        step.update(None, together=False)

    return Arm(take), (model.left_context, model.right_context)


def bare(model: nn.Module, time_major: bool) -> Arm:
    """The loop that one would write."""
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5)

    def take(batch: Minibatch[Tensor]) -> None:
        optimiser.zero_grad(set_to_none=True)
        output = model(batch.feats, batch.labels.shape[1])
        labels = batch.labels.t() if time_major else batch.labels
        loss = nn.functional.nll_loss(output.reshape(-1, PDFS), labels.reshape(-1), reduction="sum")
        loss.backward()
        optimiser.step()

    return Arm(take)


def minibatches(count: int, chunks: int, shape: ChunkShape) -> list[Minibatch[Tensor]]:
    """Noise in memory."""
    generator = torch.Generator().manual_seed(1)
    frames = chunks * shape.width
    return [
        Minibatch(
            torch.randn(chunks, shape.rows, FEATS, generator=generator),
            torch.randint(PDFS, (chunks, shape.width), generator=generator),
            frames, frames, float(frames), 0, step, shape,
        )
        for step in range(count)
    ]  # fmt: skip


def measure(arms: dict[str, Arm], batches: list[Minibatch[Tensor]], rounds: int) -> dict[str, list[float]]:
    """Frames per second of each arm in each round; the first, in which everything is made, does not count."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            # The first ten minibatches update each preconditioner, later ones every fourth.
            speed = arm.frames_per_second(batches if number else batches * 3)
            if number:
                found[name].append(speed)
    return found


def main() -> None:
    """Time, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="minibatches an arm takes in a round; a multiple of 4")
    parser.add_argument("--kaldi", type=Path, metavar="WORK", help="beside Kaldi's jobs; a directory for everything")
    parser.add_argument("--train", help="with --kaldi, at first: data directory of the training speech")
    parser.add_argument("--test", help="and of the test speech")
    options = parser.parse_args()
    if options.kaldi:
        print(json.dumps(beside_kaldi(options.kaldi.resolve(), options)))
        return
    torch.set_num_threads(1)
    settle_process()  # as learners do; the bare loop profits too
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "log").mkdir()
        runs = (
            ("lstm", lstm_xconfig(), SMALL),
            ("tdnnf", tdnnf_xconfig(), RECIPES),
            ("tdnnf, small minibatches", tdnnf_xconfig(), SMALL),
        )
        for name, xconfig, (chunks, width) in runs:
            plain, contexts = learner(xconfig, False, Path(folder))
            arms = {"learner, plain gradients": plain, "learner": learner(xconfig, True, Path(folder))[0]}
            if name == "lstm":
                shape = ChunkShape(width, 20, 0)
                arms |= {
                    "bare": bare(Lstm(True), True),
                    "bare, torch.nn.LSTM without peepholes": bare(Lstm(False), True),
                }
            else:
                shape = ChunkShape(width, *contexts)
                arms["bare"] = bare(TdnnF(), False)
            speeds = measure(arms, minibatches(options.steps, chunks, shape), options.rounds)
            result[name] = summary(name, speeds)
    print(json.dumps(result | {"threads": 1, "steps": options.steps, "rounds": options.rounds}))


def beside_kaldi(work: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Microseconds a frame by Kaldi's jobs and by our learners, and the ratio, at each period."""
    nets = kaldi_training.NETS
    bench = kaldi_training.Bench(
        work, argparse.Namespace(train=options.train, test=options.test, snr=None, epochs=1, more="")
    )
    bench.prepare()
    result = {}
    for period in PERIODS:
        name, samples = f"lstm-{period}", period // 2 // 20
        of_lstm = (option for option in nets["lstm"].options if "samples-per-iter" not in option)
        nets[name] = dataclasses.replace(nets["lstm"], options=(*of_lstm, f"--trainer.samples-per-iter={samples}"))
        found: dict[str, list[float]] = {"kaldi-2": [], "periodic-2": []}
        for number in range(options.rounds):
            for arm, times in found.items():
                folder = bench.recipe / "exp" / f"{name}_{arm}_time"
                bench.run_arm(name, arm, number, folder)
                seconds, iterations = bench.seconds_per_iteration(folder)
                times.append(1e6 * seconds * iterations / bench.frames(folder))
                print(f"{period} frames, round {number}, {arm}: {times[-1]:.1f} us a frame", flush=True)
        ratio = statistics.median(ours / theirs for theirs, ours in zip(*found.values(), strict=True))
        medians = {f"{arm}_us": round(statistics.median(times), 2) for arm, times in found.items()}
        result[str(period)] = medians | {"ratio": round(ratio, 3)}
    return result


def summary(name: str, speeds: dict[str, list[float]]) -> dict[str, float]:
    """The medians, printed too."""

    def ratio(of: str, over: str) -> float:
        return statistics.median(a / b for a, b in zip(speeds[of], speeds[over], strict=True))

    print(f"\n{name}: frames/s, and by the bare loop's")
    for arm, values in speeds.items():
        print(f"  {arm:40} {statistics.median(values):9.0f}   {ratio(arm, 'bare'):.3f}")
    figures = {
        "plain_over_bare": ratio("learner, plain gradients", "bare"),
        "with_natural_gradient_over_bare": ratio("learner", "bare"),
        "share_of_natural_gradient": 1.0 - ratio("learner", "learner, plain gradients"),
    }
    if len(speeds) == 4:
        figures["plain_over_nn_lstm"] = ratio("learner, plain gradients", "bare, torch.nn.LSTM without peepholes")
    return {key: round(value, 4) for key, value in figures.items()}


if __name__ == "__main__":
    main()
