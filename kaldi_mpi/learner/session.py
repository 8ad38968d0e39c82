"""One training from its options to final.mdl, as every rank runs it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from kaldi_mpi.averaging import make_strategy
from kaldi_mpi.learner import checkpoint, export, setup
from kaldi_mpi.learner.evaluate import Pass, mean_posterior
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.loop import Learner, Plan
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.learner.schedule import ExponentialRate
from kaldi_mpi.loader import ChunkPlan, ChunkShape, Corpus
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.report.iteration import IterationLogs
from kaldi_mpi.report.log import logger
from kaldi_mpi.report.progress import Progress
from kaldi_mpi.transport.launch import TERMINAL_ENV
from kaldi_mpi.transport.world import World


def make_plan(
    options: TrainOptions, model: AcousticModel, shape: ChunkShape, data: Corpus, world: World
) -> tuple[Plan, int]:
    """How many steps the training has, and how many labelled frames they are over all learners."""
    chunks = ChunkPlan(data.num_frames, shape.width, options.chunks_per_minibatch, size=world.size, seed=options.seed)
    num_steps = max(1, round(options.num_epochs * chunks.steps_per_epoch))
    whole, rest = divmod(num_steps, chunks.steps_per_epoch)
    total_frames = whole * data.total_frames + sum(
        chunks.frames_of_step(whole * chunks.steps_per_epoch + step) for step in range(rest)
    )
    plan = Plan(
        num_steps=num_steps,
        steps_per_iteration=max(1, options.samples_per_iter // options.chunks_per_minibatch),
        num_epochs=options.num_epochs,
        chunks_per_minibatch=options.chunks_per_minibatch,
        # As train_rnn.py derives nnet3-train's --optimization.*-deriv-time from the margin.
        min_deriv_time=-(options.deriv_truncate_margin + model.left_context),
        max_deriv_time=shape.width - 1 + options.deriv_truncate_margin + model.right_context,
    )
    return plan, total_frames


def train(options: TrainOptions, world: World) -> None:
    """Train and, on rank 0, write the model directory.

    Raises:
        KaldiMpiError: anything the user can mend: options, data, disk.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.use_deterministic_algorithms(True, warn_only=True)
    setup.check_inputs(options)
    folder = Path(options.dir)
    if world.rank == 0:
        (folder / "log").mkdir(parents=True, exist_ok=True)
    world.barrier()
    device = setup.choose_device(options, world)
    labels, transitions = setup.load_labels(options)
    data = setup.open_data(options, labels, world)
    model = setup.make_model(options, data, transitions.num_pdfs, world, device)
    shape = setup.chunk_shape(options, model)
    plan, total_frames = make_plan(options, model, shape, data.train, world)
    flat = FlatParameters(model)
    strategy = make_strategy(options.strategy, world, frames_per_average=options.frames_per_average)
    learner = Learner(
        world,
        model,
        flat,
        strategy,
        KaldiSgd(flat, options.momentum, options.max_param_change),
        ExponentialRate(options.initial_rate, options.final_rate, total_frames),
        data.train,
        data.valid,
        data.diagnostic,
        shape,
        plan,
        seed=options.seed,
        logs=IterationLogs(folder / "log"),
        progress=Progress(folder / "progress.json", terminal=os.environ.get(TERMINAL_ENV) == "1")
        if world.rank == 0
        else None,
        on_iteration=lambda iteration: _maybe_save(iteration, options, world, learner),
        loader_threads=options.loader_threads,
    )
    resumed = options.resume and checkpoint.load(folder, options, world, learner)
    if world.rank == 0:
        logger.info(
            "%d learner(s) on %s, strategy %s, %d parameters, contexts %d and %d, %d steps, %d frames%s",
            world.size, device, strategy.name, flat.values.numel(), model.left_context, model.right_context,
            plan.num_steps, total_frames, f", going on at step {learner.step}" if resumed else "",
        )  # fmt: skip
    learner.run()
    how = Pass(shape, plan.chunks_per_minibatch, world, device)
    model.eval()
    priors = mean_posterior(model, data.train, how, options.prior_subset_size, options.seed)
    if world.rank == 0:
        export.write_cmvn_opts(options)
        export.copy_alignment_files(options)
        export.write_final_model(options, model, transitions, priors)
        checkpoint.remove(folder)
    world.barrier()


def _maybe_save(iteration: int, options: TrainOptions, world: World, learner: Learner) -> None:
    if options.checkpoint_interval and iteration % options.checkpoint_interval == 0:
        checkpoint.save(Path(options.dir), options, world, learner)
