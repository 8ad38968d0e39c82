"""What a training opens before it trains, for tests that look at the parts."""

from __future__ import annotations

from pathlib import Path

from kaldi_mpi.formats.transition import TransitionModel, read_transition_model
from kaldi_mpi.learner.dataset import Dataset
from kaldi_mpi.learner.network import Network
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.transport.world import SoloWorld, World


def transitions_of(options: TrainOptions) -> TransitionModel:
    return read_transition_model(Path(options.data.ali_dir) / "final.mdl")


def open_data(options: TrainOptions, world: World | None = None) -> tuple[Dataset, Network]:
    """The data, and the network that says how they are cut; its transforms are not estimated."""
    world = world or SoloWorld()
    network = Network(options.xconfig, options.data.seed, world)
    tid_to_pdf = transitions_of(options).tid_to_pdf
    outputs = network.model.output_dim
    return Dataset.open(options.data, Path(options.dir), tid_to_pdf, network.context, world, outputs), network


def open_all(options: TrainOptions, world: World | None = None) -> tuple[Dataset, Network]:
    """The data and the network as training begins."""
    dataset, network = open_data(options, world)
    network.check_data(dataset)
    network.estimate_transforms(dataset, world or SoloWorld(), options.max_lda_jobs * options.samples_per_iter)
    return dataset, network
