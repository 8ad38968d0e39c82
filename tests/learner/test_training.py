"""The learners, in real MPI ranks: what N of them compute, to the bit or to float32 rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.toy import Toy, make_toy, train


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


def trained(toy: Toy, name: str, num_learners: int, *options: str) -> Path:
    folder = toy.experiment(name)
    result = train(num_learners, toy.options(folder, *options))
    assert result.returncode == 0, result.stderr
    return folder


def parameters(folder: Path) -> np.ndarray:
    """All trained parameters of folder/final.mdl, flat."""
    from kaldi_mpi.learner.flat import FlatParameters
    from kaldi_mpi.nnet3 import read_am, to_torch

    return FlatParameters.of_model(to_torch(read_am(folder / "final.mdl").nnet)).to_numpy()


PERIODIC = ("--strategy=periodic", "--frames-per-average=500")


def test_one_learner_is_a_plain_loop_bit_for_bit(toy: Toy) -> None:
    """The whole machinery in one rank gives the parameters that a loop without MPI, strategy or learner gives."""
    import torch

    from kaldi_mpi.learner.flat import FlatParameters
    from kaldi_mpi.learner.optimiser import KaldiSgd
    from kaldi_mpi.learner.options import parse
    from kaldi_mpi.loader import ChunkShape, MinibatchReader
    from kaldi_mpi.models.chance import Chance
    from tests.learner.opened import open_all

    one = trained(toy, "solo-allreduce", 1)
    other = trained(toy, "solo-periodic", 1, *PERIODIC)
    assert parameters(one).tobytes() == parameters(other).tobytes()

    torch.set_num_threads(1)
    options = parse(toy.options(toy.experiment("plain")))
    data, network = open_all(options)
    model, shape = network.model, data.chunking
    assert isinstance(shape, ChunkShape)
    flat = FlatParameters.of_model(model)
    model.use_natural_gradient()
    model.mode.chance = Chance(0, 0)
    model.train()
    start = flat.to_numpy()
    optimiser = KaldiSgd(flat, 0.5, 2.0)
    frames, total = 0, 2 * data.train.total_frames
    with MinibatchReader(data.train, shape, 12, seed=0, num_epochs=2) as reader:
        for number, minibatch in enumerate(reader):
            if number % (60 // 12) == 0:  # an iteration begins
                rate = 0.01 if number == 40 - 60 // 12 else 0.03 * np.exp(frames / total * np.log(0.01 / 0.03))
                for component in model.by_name.values():
                    component.zero_statistics()
            flat.gradients.zero_()
            output = model(
                torch.from_numpy(minibatch.feats), -shape.left, 10,
                min_deriv_time=-8 - model.left_context, max_deriv_time=9 + 8 + model.right_context,
            )  # fmt: skip
            labels_now = torch.from_numpy(minibatch.labels)
            loss = torch.nn.functional.nll_loss(
                output.reshape(-1, output.shape[2]), labels_now.reshape(-1), ignore_index=-1, reduction="sum"
            )
            loss.backward()
            for component in model.by_name.values():
                component.finish_gradient()
            optimiser.step(float(rate), len(minibatch.labels))
            frames += minibatch.frames
    assert frames == total
    assert not np.array_equal(start, flat.to_numpy())
    assert flat.to_numpy().tobytes() == parameters(one).tobytes()


@pytest.mark.parametrize("num_learners", [2, 3, 4])
def test_allreduce_equals_one_learner_with_the_n_fold_minibatch(toy: Toy, num_learners: int) -> None:
    """With plain gradients: each learner preconditions its own part of the minibatch."""
    one_epoch = "--trainer.num-epochs=1"  # rounding grows with the steps; a wrong rule is 1000 times further off
    plain = "--natural-gradient=false"
    size = f"--trainer.rnn.num-chunk-per-minibatch={12 // num_learners}"
    # Iterations of as many steps: as each begins, all units of LSTMs are repaired.
    iteration = f"--trainer.samples-per-iter={60 // num_learners}", f"--trainer.lda.max-lda-jobs={10 * num_learners}"
    many = trained(toy, f"n{num_learners}", num_learners, one_epoch, size, plain, *iteration)
    one = toy.work / "solo-12"
    if not one.exists():
        trained(toy, "solo-12", 1, one_epoch, plain)
    lda = "configs/lda.mat"
    assert (many / lda).read_bytes() == (one / lda).read_bytes()
    np.testing.assert_allclose(parameters(many), parameters(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", [("--strategy=allreduce",), PERIODIC], ids=["allreduce", "periodic"])
def test_same_seed_same_learners_same_bytes(toy: Toy, strategy: tuple[str, ...]) -> None:
    name = strategy[0].partition("=")[2]
    one, other = (trained(toy, f"{name}-{run}", 3, *strategy) / "final.mdl" for run in "ab")
    assert one.read_bytes() == other.read_bytes()
    different = trained(toy, f"{name}-seed", 3, *strategy, "--trainer.srand=1") / "final.mdl"
    assert one.read_bytes() != different.read_bytes()


def test_periodic_learners_differ_between_averagings_and_end_as_one(toy: Toy) -> None:
    """Averaging seldom gives another model than averaging often, and both learn."""
    often = trained(toy, "often", 2, "--strategy=periodic", "--frames-per-average=1")
    seldom = trained(toy, "seldom", 2, "--strategy=periodic", "--frames-per-average=1000000")
    assert not np.allclose(parameters(often), parameters(seldom), rtol=1e-3)
    for folder in (often, seldom):
        first, last = (_log_likelihood(folder, name) for name in ("0", "final"))
        assert first == pytest.approx(np.log(1 / 5), abs=0.3)
        assert last > first + 0.3


def test_what_a_training_leaves_behind(toy: Toy) -> None:
    """The files of a Kaldi model directory, and logs that Kaldi's scripts parse."""
    folder = trained(toy, "files", 2)
    assert (folder / "cmvn_opts").read_text() == "--norm-means=true --norm-vars=false\n"
    for name in ("tree", "phones.txt", "num_jobs"):
        assert (folder / name).read_bytes() == (toy.ali_dir / name).read_bytes()
    assert not (folder / "checkpoint").exists() and not list(folder.glob(".*"))
    held_out = (folder / "valid_uttlist").read_text().split()
    assert len(held_out) == 6 and not set(held_out) & set((folder / "train_subset_uttlist").read_text().split())
    for job in (1, 2):
        text = (folder / "log" / f"train.0.{job}.log").read_text()
        assert "Overall average objective function for 'output' is -" in text and " frames." in text
    text = (folder / "log" / "compute_prob_valid.1.log").read_text()
    assert "Overall log-likelihood for 'output' is -" in text and " per frame, over " in text
    assert "Overall accuracy for 'output' is 0." in text

    from kaldi_mpi.nnet3 import read_am

    priors = read_am(folder / "final.mdl").priors
    assert priors.shape == (5,) and priors.sum() == pytest.approx(1, abs=1e-5) and priors.min() > 0.02


def test_text_model_is_the_binary_model(toy: Toy) -> None:
    binary = trained(toy, "binary", 1, "--trainer.num-epochs=0.5")
    text = trained(toy, "text", 1, "--trainer.num-epochs=0.5", "--binary=false")
    assert (text / "final.mdl").read_bytes().startswith(b"<TransitionModel>")
    np.testing.assert_allclose(parameters(text), parameters(binary), rtol=1e-6)


def _log_likelihood(folder: Path, name: str) -> float:
    text = (folder / "log" / f"compute_prob_valid.{name}.log").read_text()
    return float(text.split("Overall log-likelihood for 'output' is ")[1].split()[0])
