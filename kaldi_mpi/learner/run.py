"""What a training is, from its options to final.mdl, top to bottom, as every rank runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kaldi_mpi import log as console
from kaldi_mpi.averaging import Strategy, make_strategy
from kaldi_mpi.averaging.settings import CENTRES
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.transition import TransitionModel, read_transition_model
from kaldi_mpi.learner import export, faults
from kaldi_mpi.learner.alignment_counts import PRIOR_SCALE_FILE, AlignmentCounts
from kaldi_mpi.learner.asynchronous import AsynchronousPhase, Surroundings
from kaldi_mpi.learner.chain_graphs import make_graphs, read_denominator
from kaldi_mpi.learner.chain_objective import LfMmi
from kaldi_mpi.learner.checkpoint import Checkpoints
from kaldi_mpi.learner.combine import models_to_combine
from kaldi_mpi.learner.dataset import Dataset
from kaldi_mpi.learner.facts import facts
from kaldi_mpi.learner.finish import finish
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.images import ImageAugmentation
from kaldi_mpi.learner.inputs import check_egs, check_files, check_first_features
from kaldi_mpi.learner.iterations import IterationModels, sum_statistics
from kaldi_mpi.learner.lock import run_lock
from kaldi_mpi.learner.logs import Traffic, TrainingLog
from kaldi_mpi.learner.members import LeftBehindError
from kaldi_mpi.learner.network import Network
from kaldi_mpi.learner.objective import DerivativeTimes, FrameObjective, Objective
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.options import TrainOptions, parse
from kaldi_mpi.learner.progress import Progress
from kaldi_mpi.learner.schedule import (
    ExponentialRate,
    Plan,
    SuperLearner,
    check_super_learners,
    make_phases,
)
from kaldi_mpi.learner.server import Server, command_server
from kaldi_mpi.learner.shrinking import Shrinking
from kaldi_mpi.learner.stages import Stages, stages_to_do
from kaldi_mpi.learner.state import TrainingState, copy_model
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.learner.stopping import Stopping
from kaldi_mpi.learner.synchronous import run_synchronous
from kaldi_mpi.learner.validate import IterationEnd, Pass, Validation
from kaldi_mpi.loader import ChunkPlan
from kaldi_mpi.log import logger
from kaldi_mpi.models.chance import Chance
from kaldi_mpi.models.passes import keep_memory
from kaldi_mpi.processes import NotedSignals
from kaldi_mpi.transport import gpu, guard
from kaldi_mpi.transport.beat import Beat
from kaldi_mpi.transport.status import TERMINAL_ENV, Status, started_again
from kaldi_mpi.transport.world import World


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi train``: be this rank until the training is done (a failure ends all ranks with status 1)."""
    # MPI starts with the import, and only here: everything else of the package works without it.
    from kaldi_mpi.processes import die_with_parent
    from kaldi_mpi.transport.guard import guarded
    from kaldi_mpi.transport.mpi import MpiWorld

    settle_process()
    die_with_parent()
    world = MpiWorld()
    console.set_up("kaldi-mpi-train", world.rank, logging.INFO if world.rank == 0 else logging.WARNING)
    with guarded(world) as status:
        if world.rank == 0:
            logger.info("%s", " ".join(["kaldi-mpi train", *arguments]))
        try:
            why = train(parse(arguments), world, status)
        except LeftBehindError as error:
            logger.warning("learner rank %d: %s", world.rank, error)
            guard.end_apart(world, status, "left behind", str(error))
        if world.lost:
            guard.end_apart(world, status, "stopped" if why else "finished", why)
        if why:
            status.write("stopped", why)
        world.close()


def settle_process() -> None:
    """What makes a process that trains on a CPU faster, and holds for all of it."""
    # Derivatives at the outputs of a network that is sure of them are denormal numbers, with which a CPU multiplies
    # several times more slowly: a TDNN's training went down to a fifth of its speed. Threads inherit this.
    torch.set_flush_denormal(True)
    keep_memory()


def train(options: TrainOptions, everyone: World, status: Status | None = None) -> str:
    """Train and, on rank 0, write the model directory.

    Every rank reads the same files and makes the same choices from the same seed, so nothing need be sent.

    Args:
        options: of the training.
        everyone: all ranks.
        status: what the launcher reads of this one; None: signals are none of the training's business.

    Returns:
        why it has stopped before its end, leaving a checkpoint; "": it is done.

    Raises:
        KaldiMpiError: anything the user can mend: options, data, disk.
    """
    # What can be wrong is looked for before anything is read that takes long.
    check_files(options.data, options.xconfig, options.input_model)
    locked = run_lock(Path(options.dir)) if everyone.rank == 0 else contextlib.nullcontext()
    with (
        locked,
        Beat.of_environment(everyone.rank, Path(options.dir) / "log", everyone.waits, everyone.last_exchanges) as beat,
    ):
        return _train(options, everyone, status, beat)


def _train(options: TrainOptions, everyone: World, status: Status | None, beat: Beat) -> str:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings, folder = options.settings, Path(options.dir)
    world = everyone
    if settings.dedicated_server:
        if everyone.size < 2:
            raise ConfigError("--dedicated-server: needs a rank besides the learners; start one more")
        serves = everyone.rank == everyone.size - 1
        world = everyone.split(int(serves))
        if serves:
            return serve(options, everyone, status)
    check_super_learners(settings.super_learner_size, world.size)
    device = choose_device(options.use_gpu, world)
    transitions = None if options.raw else read_transition_model(Path(options.data.ali_dir) / "final.mdl")
    network = Network(options.xconfig, options.data.seed, world, options.input_model)
    network.check_output(None if transitions is None else transitions.num_pdfs, options.trains_xent)
    objective: Objective = FrameObjective()
    if options.chain is not None and transitions is not None:
        if world.rank == 0:
            make_graphs(options, transitions)
        world.barrier()
        denominator = read_denominator(options, transitions.num_pdfs, world.rank == 0)
        objective = LfMmi(denominator, options.chain.objective)
    images = None
    if options.data.image_augmentation:
        images = ImageAugmentation.parse(options.data.image_augmentation)
        images.check(network.model.input_dim)
    for pattern in options.dropout_schedule.check(network.model):
        logger.warning("--trainer.dropout-schedule: no component with dropout is named %s", pattern)
    if options.data.egs_dir is not None:
        check_egs(options.data, network.context, network.model.ivector_dim > 0)
    else:
        check_first_features(options.data, network)
    if world.rank == 0:
        (folder / "log").mkdir(parents=True, exist_ok=True)
        (folder / "journal").mkdir(exist_ok=True)
        # Decoding wants these, also with the model of an iteration.
        export.write_cmvn_opts(folder, options.data.cmvn)
        if not options.raw:
            export.copy_alignment_files(folder, Path(options.data.ali_dir))
        if options.data.frame_subsampling_factor is not None:
            export.write_subsampling(folder, options.data.frame_subsampling_factor)
        export.copy_data_properties(folder, options.data)
    world.barrier()

    # The data, and the model.
    tid_to_pdf = np.zeros(0, np.int32) if transitions is None else transitions.tid_to_pdf
    dataset = Dataset.open(options.data, folder, tid_to_pdf, network.context, world, network.model.output_dim)
    network.check_data(dataset)
    chunks = dataset.plan(world.size)
    plan, total_frames = make_plan(options, dataset, chunks)
    stages = stages_to_do(options, plan.num_iterations)
    if world.rank == 0 and options.chain is not None:
        export.write_num_iterations(folder, plan.num_iterations)
    if stages.exits:
        plan = dataclasses.replace(plan, exit_step=plan.first_step(stages.end_iteration))
    if network.missing and not stages.lda:
        raise DataError(f"no such file (--stage {options.stage} skips its estimation)", file=network.missing[0][1])
    network.estimate_transforms(dataset, world, options.max_lda_jobs * options.samples_per_iter)
    models = begin_models(options, transitions, dataset, network, stages, plan, world)
    model = network.model.to(device)
    flat = FlatParameters.of_model(model)
    model.mode.chance = Chance(options.data.seed, world.rank)
    if options.natural_gradient:
        model.use_natural_gradient()

    # How much, how fast, in which phases.
    rate = ExponentialRate(options.initial_rate, options.final_rate, total_frames, plan.num_iterations)
    super_learner = make_super_learner(settings.super_learner_size, world, device)
    phases = make_phases(options.phases, settings, plan, world, everyone, super_learner)

    # What the learner keeps, and where it is told.
    state = TrainingState(
        model,
        flat,
        KaldiSgd(flat, options.momentum, options.max_param_change),
        [phase.strategy for phase in phases],
    )
    progress = Progress(folder / "progress.json", terminal=os.environ.get(TERMINAL_ENV) == "1")
    log = TrainingLog(folder, world.rank, rate, plan.num_epochs, progress if world.rank == 0 else None)
    learner = LearnerStep(
        state,
        rate,
        world.size,
        DerivativeTimes.of_margin(options.deriv_truncate_margin, *network.context),
        log,
        faults.Injector(options.faults, world.rank),
        backstitch_scale=options.backstitch_scale,
        backstitch_interval=options.backstitch_interval,
        dropout=options.dropout_schedule,
        shrinking=Shrinking(options.shrink_value, options.shrink_saturation_threshold, options.proportional_shrink),
        images=images,
        beat=beat,
        objective=objective,
    )
    how = Pass(dataset, world, device, beat=beat, objective=objective)
    validation = Validation(
        model, flat, how, log, models if world.rank == 0 else None, by_class=options.compute_per_dim_accuracy
    )

    decides = facts(options, everyone.size, network.transforms) if world.rank == 0 else None
    checkpoints = Checkpoints(folder, everyone, decides, options.checkpoints_kept, _ends_run(everyone, status))
    if not options.resume and not started_again():
        checkpoints.begin_anew()
    saved = checkpoints.load()
    same_ranks = checkpoints.num_ranks == everyone.size
    goes_on = saved is not None and stages.begins_with(plan.iteration(saved["state"]["step"]))
    if goes_on:
        state.load_state_dict(saved["state"], same_ranks)
        log.load_state_dict(saved["log"])
        if not same_ranks:
            state.step = min(plan.num_steps, round(saved["epochs"] * plan.steps_per_epoch))
            if world.rank == 0:
                logger.warning(
                    "%d learners go on where %d have saved their state: learning rates are those of %d from here on, "
                    "and the rest of this epoch is shared out anew, so that some of it may come twice or not at all",
                    everyone.size, checkpoints.num_ranks, everyone.size,
                )  # fmt: skip
    else:
        if not stages.initial:
            name = models.combined if stages.combined_before else stages.first_iteration
            copy_model(models.read(name, f"--stage {options.stage} begins with it"), model, str(models.path(name)))
            state.begun_at = state.step = plan.first_step(stages.first_iteration)
            state.frames = frames_before(state.step, dataset, chunks)
        if world.rank == 0:
            for old in (folder / "journal").glob("learner.*"):
                old.unlink()
    world.barrier()
    spelled = ",".join(f"{spec.name}:{spec.epochs:g}ep" for spec in options.phases)
    if world.rank == 0:
        way = gpu.describe() if device.type == "cuda" else "parameters travel from main memory"
        logger.info("%s, in %s", way, settings.transfer_dtype)
        logger.info(
            "%d learner(s) on %s, strategy %s, %d parameters, contexts %d and %d, %d steps, %d frames%s",
            world.size, device, spelled, flat.values.numel(), model.left_context, model.right_context,
            plan.num_steps, total_frames, f", going on at step {state.step}" if state.step else "",
        )  # fmt: skip

    def parts(step: int, frames: int, values: torch.Tensor | None, changed: dict[Strategy, Any]) -> dict[str, Any]:
        own = state.state_dict(changed) | {"step": step, "frames": frames}
        if values is not None:
            own["parameters"] = values
        return {
            "state": own, "log": log.state_dict(), "iteration": learner.state_dict(),
            "epochs": step / plan.steps_per_epoch,
        }  # fmt: skip

    def save(wait: bool) -> None:
        command_server(everyone, settings.dedicated_server, "save", state.step)
        checkpoints.save(state.step, parts(state.step, state.frames, None, {}), stopping.left)
        if wait:
            command_server(everyone, settings.dedicated_server, "wait")
            checkpoints.wait()

    # The training.
    model.train()
    if state.step == 0 and stages.initial:
        validation.run(0, flat.to_numpy(), 0.0)
    traffic = Traffic(world, phases)
    first_frames, first_step = state.frames, state.step
    last_step = plan.num_steps if plan.exit_step is None else plan.exit_step
    if goes_on and not plan.ends_iteration(state.step) and same_ranks:
        learner.load_state_dict(saved["iteration"])
    elif state.step < last_step:
        learner.begin_iteration(plan.iteration(state.step), state.frames)
    minutes = options.checkpoint_minutes
    with may_stop(status) as signals:
        stopping = Stopping(world, signals, save_seconds=None if minutes is None else 60 * minutes)
        for phase in phases:
            if state.step >= min(phase.end_step, last_step) or stopping.why:
                continue
            if len(phases) > 1 and world.rank == 0:
                logger.info("from step %d: strategy %s", phase.first_step, phase.name)
            ends: Generator[IterationEnd | None]
            if phase.strategy.asynchronous:
                journal_dir = folder / "journal" if options.journal else None
                tickets = checkpoints.tickets if goes_on and state.step == first_step else None
                around = Surroundings(
                    everyone, world, dataset, plan, log, validation, settings, stopping, checkpoints, parts, tickets,
                    options.lost_after, journal_dir, *(() if status is None else (status.spare,)),
                )  # fmt: skip
                ends = AsynchronousPhase(phase, learner, around).run()
            elif everyone.lost:
                save(wait=True)
                raise ConfigError(
                    f"--strategy {phase.name} waits for all learners, and rank {', '.join(map(str, everyone.lost))} is "
                    "lost: the same command goes on from here with all of them"
                )
            else:
                ends = run_synchronous(phase, world, dataset, chunks, plan, learner, log, stopping)
            with contextlib.closing(ends):
                for end in ends:
                    beat.end_watch("the end of an iteration")
                    if end is not None:
                        iteration = plan.iteration(state.step)
                        log.end_iteration(iteration - 1)
                        sum_statistics(model, world)
                        validation.run(iteration, end.mean, end.spread)
                    stops = bool(stopping.why) and state.step < last_step
                    exits = state.step == plan.exit_step
                    if stops or stopping.saves or plan.saves(state.step):
                        save(wait=stops or exits)
                    if stops or state.step == last_step:
                        break
                    if end is not None:
                        learner.begin_iteration(plan.iteration(state.step), state.frames)
    beat.end_watch("the end of the training")
    traffic.report(log, state.frames - first_frames)
    if world.rank == 0:
        for line in state.optimiser.report():
            logger.info("%s", line)
    stopped = stopping.why if state.step < last_step else ""
    command_server(everyone, settings.dedicated_server, "wait")
    checkpoints.wait()  # for what has been written behind the learners' back
    command_server(everyone, settings.dedicated_server, "end", stopped)

    if stopped:
        if world.rank == 0:
            logger.warning("stopped at step %d of %d: %s", state.step, plan.num_steps, stopped)
        return stopped
    if stages.exits:
        if world.rank == 0:
            logger.info(
                "stopped before iteration %d (--exit-stage); the same command goes on from there", stages.end_iteration
            )
        return ""
    finish(options, stages, validation, models, log)
    if world.rank == 0:
        log.summary.write_report(folder / "accuracy.report")
        log.summary.write(folder / "log" / "summary.json", strategy=spelled, num_learners=world.size)
        checkpoints.remove()
    world.barrier()
    return ""


def _ends_run(everyone: World, status: Status | None) -> Callable[[BaseException], None] | None:
    """What a thread calls that has failed, where there is a launcher to be told."""
    return None if status is None else functools.partial(guard.end_run, everyone, where="on its checkpoint thread")


@contextlib.contextmanager
def may_stop(status: Status | None) -> Iterator[NotedSignals | None]:
    """While the block runs, this learner notes signals, and the launcher knows that it stops when it is asked to."""
    if status is None:
        yield None
        return
    with NotedSignals() as signals:
        status.write("running", "", stops=True)
        yield signals
        status.write("running", "")


def begin_models(
    options: TrainOptions,
    transitions: TransitionModel | None,
    dataset: Dataset,
    network: Network,
    stages: Stages,
    plan: Plan,
    world: World,
) -> IterationModels:
    """What the alignments' counts decide, on all learners: the models' transitions and priors, the outputs' scale.

    Raw networks have none of these.
    """
    folder = Path(options.dir)
    kept = models_to_combine(plan.num_iterations, plan.iterations_per_epoch, options.max_models_combine)
    kept = kept if options.do_final_combination else []
    interval = options.preserve_model_interval if options.cleanup else 1
    if transitions is None:
        return IterationModels(folder, None, plan.num_iterations, kept, interval, options.binary)
    if options.chain is not None:
        what = transitions, np.zeros(0, np.float32)
        return IterationModels(folder, what, plan.num_iterations, kept, interval, options.binary)
    counts = AlignmentCounts.of_all_learners(options.data.ali_dir, transitions, dataset.transition_counts, world)
    if stages.prior_scale and world.rank == 0:
        counts.write_prior_scale(folder, options.presoftmax_prior_scale_power)
    world.barrier()
    network.scale_by_priors(folder / PRIOR_SCALE_FILE)
    trained = counts.trained_transitions(), counts.priors()
    return IterationModels(folder, trained, plan.num_iterations, kept, interval, options.binary)


def serve(options: TrainOptions, everyone: World, status: Status | None) -> str:
    """Be the rank that only keeps the centre, until the training's end; returns what `train` does."""
    strategies = [
        make_strategy(spec.name, everyone, options.settings) if spec.name in CENTRES else None
        for spec in options.phases
    ]
    checkpoints = Checkpoints(
        Path(options.dir), everyone, None, options.checkpoints_kept, _ends_run(everyone, status)
    )  # fmt: skip
    server = Server(
        everyone, strategies, options.settings, Path(options.dir), checkpoints, options.journal, options.lost_after
    )  # fmt: skip
    if status is not None:
        status.write("running", "", stops=True)
    return server.run()


def make_plan(options: TrainOptions, dataset: Dataset, chunks: ChunkPlan) -> tuple[Plan, int]:
    """How many steps the training has, and how many labelled frames they are over all learners."""
    steps_per_epoch = chunks.steps_per_epoch
    num_steps = max(1, round(options.num_epochs * steps_per_epoch))
    plan = Plan(
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        steps_per_iteration=max(1, _per_iteration(options, dataset, chunks)),
        num_epochs=options.num_epochs,
        checkpoint_interval=options.checkpoint_interval,
    )
    return plan, frames_before(num_steps, dataset, chunks)


def _per_iteration(options: TrainOptions, dataset: Dataset, chunks: ChunkPlan) -> int:
    """A learner's minibatches between two validations."""
    if options.chain is None:
        return options.samples_per_iter // dataset.usual_minibatch(chunks)
    # In input frames, as Kaldi has them.
    frames = dataset.usual_frames(chunks) * (options.data.frame_subsampling_factor or 1)
    return options.chain.frames_per_iter // frames


def frames_before(step: int, dataset: Dataset, chunks: ChunkPlan) -> int:
    """Labelled frames that all learners have trained on when `step` is the next."""
    whole, rest = divmod(step, chunks.steps_per_epoch)
    return whole * dataset.train.total_frames + sum(
        chunks.frames_of_step(whole * chunks.steps_per_epoch + number) for number in range(rest)
    )


def choose_device(wanted: str, world: World) -> torch.device:
    """The CPU, or this learner's GPU: learners of one host take its GPUs in turn.

    Args:
        wanted: ``--use-gpu``.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    there = torch.cuda.is_available()
    if wanted in ("no", "false") or (wanted == "auto" and not there):
        return torch.device("cpu")
    if not there:
        raise ConfigError(f"--use-gpu {wanted}: learner rank {world.rank} sees no CUDA device")
    hosts = world.gather(socket.gethostname())
    local = hosts[: world.rank].count(hosts[world.rank])
    device = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def make_super_learner(size: int, world: World, device: torch.device) -> SuperLearner | None:
    """This learner's super-learner of `size`; None where each is alone.

    Gradients are summed by NCCL on GPUs, by MPI on CPUs.
    """
    if size == 1:
        return None
    group = world.split(world.rank // size)
    leaders = world.split(world.rank % size)
    sum_: Callable[[torch.Tensor], None]
    if device.type == "cuda":
        sum_ = gpu.TorchGroup(group, device).sum_
    else:
        sum_ = lambda tensor: group.sum_(tensor.numpy())  # noqa: E731
    return SuperLearner(group, leaders, sum_)
