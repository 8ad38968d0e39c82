"""Recordings of the LSTM's loops, with a recorder that runs the function again in place of a GPU's replay."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kaldi_mpi.models import lstm_device
from kaldi_mpi.models.cuda_graphs import Graphs, Tensors
from kaldi_mpi.models.lstm import lstm, small_layer
from kaldi_mpi.models.lstm_backward import LstmSettings
from kaldi_mpi.models.lstm_device import Means, means_for, try_means

CPU = torch.device("cpu")


class Rerun:
    """As a CUDA graph: replays write to the memory of the recording, whatever has been done with it since."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        self.recorded += 1
        outputs = run()

        def replay() -> None:
            self.replayed += 1
            for own, new in zip(outputs, run(), strict=True):
                if own is not None and new is not None and own is not new:
                    own.copy_(new)

        return replay, outputs


def layer(seed: int, frames: int, projection: bool, masked: bool) -> list[Tensor]:
    """Output and gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(frames, 5, 4), (24, 4 + (3 if projection else 6)), (24,), (3, 6)]
    if projection:
        shapes += [(3, 6), (3,)]
    x, w_all, bias, peepholes, *more = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    settings = LstmSettings(-2, 0.9, 1.0, 0.5, zeroing_interval=3)
    mask = (torch.rand(frames, 5, 3, generator=generator) < 0.6).float() if masked else None
    w_rp, b_rp = more if projection else (None, None)
    output = lstm(x, w_all, bias, peepholes, settings, mask=mask, w_rp=w_rp, b_rp=b_rp)
    return [output, *torch.autograd.grad(output.square().sum(), [x, w_all, bias, peepholes, *more])]


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_replays_give_what_runs_give(projection: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [(seed, frames) for seed in range(4) for frames in (7, 4)]
    wanted = [layer(seed, frames, projection, masked) for seed, frames in inputs]
    recorder = Rerun()
    monkeypatch.setitem(lstm_device._MEANS, CPU, Means(graphs=Graphs(recorder)))
    found = [layer(seed, frames, projection, masked) for seed, frames in inputs]
    # All are looked at after the last replay: none may have been written to by a later one.
    for ours, right in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))
    assert recorder.recorded == 4, "two shapes, forward and backward"
    assert recorder.replayed == 12, "all calls but the first of each"


def test_a_recording_is_of_one_thread_and_the_oldest_goes() -> None:
    recorder, runs = Rerun(), []

    def twice(x: Tensor) -> Tensors:
        runs.append(threading.get_ident())
        return (x * 2, None)

    graphs = Graphs(recorder, most=2)

    def call(columns: int) -> None:
        doubled, nothing = graphs("twice", twice, torch.ones(columns))
        assert nothing is None and doubled is not None and doubled.tolist() == [2.0] * columns

    def call_twice() -> None:
        call(3)
        call(3)

    call_twice()
    call(3)
    assert recorder.recorded == 1
    thread = threading.Thread(target=call_twice)
    thread.start()
    thread.join()
    assert recorder.recorded == 2 and len(set(runs)) == 2
    call(4)  # the first thread's recording of three columns goes
    call(3)
    assert recorder.recorded == 2
    call(3)
    assert recorder.recorded == 3


def test_where_graphs_cannot_be_used_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unable:
        def record(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(lstm_device._MEANS, CPU, Means())
    wanted = small_layer(CPU)
    try_means(CPU, Means(graphs=Graphs(Unable())), small_layer, wanted, (RuntimeError,), "launch by launch")
    assert means_for(CPU, small_layer) == Means()
    assert [record.getMessage() for record in caplog.records] == [
        "LSTM on cpu launch by launch: CUDA graphs cannot be used: operation not permitted when stream is capturing"
    ]
    graphs = Graphs(Rerun())
    try_means(CPU, Means(graphs=graphs), small_layer, wanted, (RuntimeError,), "launch by launch")
    assert means_for(CPU, small_layer).graphs is graphs
