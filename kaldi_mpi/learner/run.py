"""One training from its options to final.mdl, as every rank runs it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from kaldi_mpi.averaging import make_strategy
from kaldi_mpi.averaging.allreduce import Allreduce
from kaldi_mpi.averaging.settings import CENTRES, HIERARCHICAL
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner import checkpoint, export, faults, setup
from kaldi_mpi.learner.evaluate import Pass, mean_posterior
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.logs import IterationLogs
from kaldi_mpi.learner.loop import Learner, Surroundings
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.learner.plan import Phase, Plan
from kaldi_mpi.learner.progress import Progress
from kaldi_mpi.learner.reading import Reading
from kaldi_mpi.learner.schedule import ExponentialRate
from kaldi_mpi.learner.server import Server, tell
from kaldi_mpi.loader import Source
from kaldi_mpi.log import logger
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.transport.status import TERMINAL_ENV
from kaldi_mpi.transport.world import World

_CHECKPOINT_INTERVAL, _CHECKPOINT_INTERVAL_ASYNCHRONOUS = 1, 5  # validations, by default


def make_plan(
    options: TrainOptions, model: AcousticModel, reading: Reading, data: Source, world: World
) -> tuple[Plan, int]:
    """How many steps the training has, and how many labelled frames they are over all learners."""
    chunks = reading.plan(data, world.size)
    num_steps = max(1, round(options.num_epochs * chunks.steps_per_epoch))
    whole, rest = divmod(num_steps, chunks.steps_per_epoch)
    total_frames = whole * data.total_frames + sum(
        chunks.frames_of_step(whole * chunks.steps_per_epoch + step) for step in range(rest)
    )
    interval = options.checkpoint_interval
    plan = Plan(
        num_steps=num_steps,
        steps_per_epoch=chunks.steps_per_epoch,
        steps_per_iteration=max(1, options.samples_per_iter // reading.usual_minibatch(data, chunks)),
        num_epochs=options.num_epochs,
        checkpoint_interval=_CHECKPOINT_INTERVAL if interval is None else interval,
        checkpoint_interval_asynchronous=_CHECKPOINT_INTERVAL_ASYNCHRONOUS if interval is None else interval,
        # As train_rnn.py derives nnet3-train's --optimization.*-deriv-time from the margin.
        min_deriv_time=-(options.deriv_truncate_margin + model.left_context),
        max_deriv_time_relative=options.deriv_truncate_margin + model.right_context,
    )
    return plan, total_frames


def make_phases(options: TrainOptions, plan: Plan, world: World, everyone: World, device: torch.device) -> list[Phase]:
    """The phases of the training, with their strategies.

    Args:
        world: the learners.
        everyone: the learners and a dedicated server, if there is one.

    Raises:
        ConfigError: learners that cannot be put into super-learners of the size asked for.
    """
    size, settings = options.settings.super_learner_size, options.settings
    if world.size % size:
        raise ConfigError(f"--super-learner-size {size}: {world.size} learners cannot be put into groups of {size}")
    group, peers, sum_in_group = None, everyone, None
    if size > 1:
        group = world.split(world.rank // size)
        peers = world.split(world.rank % size)
        sum_in_group = setup.group_sum(group, device)
    phases: list[Phase] = []
    first, epochs = 0, 0.0
    for number, asked in enumerate(options.phases):
        epochs += asked.epochs
        last = number == len(options.phases) - 1
        end = plan.num_steps if last else min(plan.num_steps, round(epochs * plan.steps_per_epoch))
        hierarchical = size > 1 and asked.name in HIERARCHICAL
        strategy = make_strategy(asked.name, everyone if asked.name in CENTRES else world, settings)
        if hierarchical and size == world.size:
            strategy = Allreduce(world)  # one super-learner is what allreduce is
        elif hierarchical and strategy.asynchronous:
            strategy = make_strategy(asked.name, peers, settings)
        phases.append(
            Phase(
                strategy, first, end,
                peers=peers if hierarchical else everyone if asked.name in CENTRES else world,
                group=group if hierarchical else None,
                sum_in_group=sum_in_group if hierarchical else None,
                dedicated_server=settings.dedicated_server and asked.name in CENTRES,
            )
        )  # fmt: skip
        first = end
    return phases


def train(options: TrainOptions, everyone: World) -> None:
    """Train and, on rank 0, write the model directory.

    Raises:
        KaldiMpiError: anything the user can mend: options, data, disk.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.use_deterministic_algorithms(True, warn_only=True)
    setup.check_inputs(options)
    folder = Path(options.dir)
    world = everyone
    if options.settings.dedicated_server:
        if everyone.size < 2:
            raise ConfigError("--dedicated-server: needs a rank besides the learners; start one more")
        serves = everyone.rank == everyone.size - 1
        world = everyone.split(int(serves))
        if serves:
            Server(options, everyone).run(folder)
            return
    if world.rank == 0:
        (folder / "log").mkdir(parents=True, exist_ok=True)
        (folder / "journal").mkdir(exist_ok=True)
    world.barrier()
    device = setup.choose_device(options, world)
    labels, transitions = setup.load_labels(options)
    data = setup.open_data(options, labels, world)
    model = setup.make_model(options, data, transitions.num_pdfs, world, device)
    reading = setup.make_reading(options, model)
    plan, total_frames = make_plan(options, model, reading, data.train, world)
    flat = FlatParameters.of_model(model)

    def save() -> None:
        tell(everyone, options.settings.dedicated_server, "save", learner.step)
        checkpoint.save(folder, options, everyone, learner)

    learner = Learner(
        world,
        model,
        flat,
        KaldiSgd(flat, options.momentum, options.max_param_change),
        ExponentialRate(options.initial_rate, options.final_rate, total_frames),
        data,
        reading,
        plan,
        make_phases(options, plan, world, everyone, device),
        around=Surroundings(
            logs=IterationLogs(folder / "log"),
            injector=faults.Injector(faults.parse(options.inject), world.rank),
            save=save,
            progress=Progress(folder / "progress.json", terminal=os.environ.get(TERMINAL_ENV) == "1")
            if world.rank == 0
            else None,
            journal_dir=folder / "journal" if options.journal else None,
            wire=options.settings.transfer_dtype,
            piece_size=options.settings.piece_size,
        ),
    )
    resumed = options.resume and checkpoint.load(folder, options, everyone, learner)
    if not resumed and world.rank == 0:
        for old in (folder / "journal").glob("learner.*"):
            old.unlink()
    world.barrier()
    spelled = ",".join(f"{phase.name}:{phase.epochs:g}ep" for phase in options.phases)
    if world.rank == 0:
        logger.info("%s", setup.describe_transfer(device, options))
        logger.info(
            "%d learner(s) on %s, strategy %s, %d parameters, contexts %d and %d, %d steps, %d frames%s",
            world.size, device, spelled, flat.values.numel(), model.left_context, model.right_context,
            plan.num_steps, total_frames, f", going on at step {learner.step}" if resumed else "",
        )  # fmt: skip
    learner.run()
    tell(everyone, options.settings.dedicated_server, "end")
    how = Pass(reading, world, device)
    model.eval()
    priors = mean_posterior(model, data.train, how, options.prior_subset_size, options.seed)
    if world.rank == 0:
        export.write_cmvn_opts(options)
        export.copy_alignment_files(options)
        export.copy_data_properties(options)
        export.write_final_model(options, model, transitions, priors)
        learner.summary.write(folder / "log" / "summary.json", strategy=spelled, num_learners=world.size)
        checkpoint.remove(folder)
    world.barrier()
