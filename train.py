"""Trains a ResNet: `python train.py`, or `torchrun --nproc_per_node=8 train.py`, with --config FILE and key=value.

This file is the table of contents: `build` makes each part in order, `Run.loop` is the one loop.
"""
# ruff: noqa: E402

import os
import sys

from distrib.faults import (
    DIVERGED,
    FAILED,
    FINISHED,
    STOPPED,
    USER_ERROR,
    Failure,
    Interrupted,
    StopSignals,
    report_exit,
)

STOP = StopSignals()  # first of all: a request to stop must not kill the run while it imports, which takes seconds

from distrib.parent import end_parent_too, end_with_parent

end_with_parent(os.environ)

from distrib.entry import Start, read_start
from distrib.surroundings import same_command, settle

# Before torch, which reads the environment, and which --help, --print-config and mistakes do not need.
settle()
try:
    START = read_start(sys.argv[1:]) if __name__ == "__main__" else None
except SystemExit:
    STOP.ignore()  # said is said: torchrun ends those that are not the first to leave
    raise

import contextlib
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from distrib import checkpoint, words
from distrib.alike import check_alike
from distrib.budget import Budget, find_end
from distrib.checkpoint import Checkpointer, check_room
from distrib.config import Config, UserError, settled
from distrib.data import EvalPlan, Loader, TrainPlan, build_loader, make_plans, open_data
from distrib.due import Due
from distrib.engine.evaluate import Evaluator
from distrib.engine.guard import Guard
from distrib.engine.prepare import (
    DTYPES,
    Objective,
    check_batch_norm,
    effective_precision,
    set_up_device,
    warm_up,
    wrap,
)
from distrib.engine.replicas import Replicas
from distrib.engine.state import TrainState
from distrib.engine.step import TrainStep
from distrib.faults import Agreement, exchange_interval
from distrib.folder import RunFolder
from distrib.follow import follow, keep
from distrib.layout import SYNTHETIC_CLASSES
from distrib.lease import Lease
from distrib.log import ConsoleSink, JsonlSink, Log, WandbSink
from distrib.metrics import SaveTimer, TrainMeter
from distrib.mirror import Mirror
from distrib.models import build_model
from distrib.optim import Ema, build_optimizer, build_schedule, freeze, peak_lr
from distrib.preflight import is_wanted, preflight
from distrib.progress import Progress, find_checkpoint, find_progress, open_folder
from distrib.rescue import Rescue
from distrib.restarts import count_start, forget_starts
from distrib.runtime import Runtime, leave, start
from distrib.store import open_store
from distrib.trace import Trace
from distrib.watchdog import EVALUATION, SAVE, TRAINING, Watchdog, record_collectives, save_collectives
from distrib.weights import checksum, load_weights


@dataclass
class Run:
    """The parts of a run; the loop, and what is due after a step."""

    config: Config
    runtime: Runtime
    folder: RunFolder
    lease: Lease | None  # on the rank that writes
    log: Log
    watchdog: Watchdog
    budget: Budget
    plan: TrainPlan
    eval_plan: EvalPlan
    loader: Loader
    state: TrainState
    step: TrainStep
    rescue: Rescue
    replicas: Replicas
    evaluator: Evaluator
    checkpointer: Checkpointer | None  # on the rank that writes
    schedule: Callable[[int], float]
    due: Due
    total_steps: int
    data: str  # fingerprint of the training images
    classes: list[str] | None  # their names, in the order of the labels; None for synthetic data
    progress: Progress
    told_of_skips: bool  # or nobody need be told
    unsaved: bool = False  # whether this start has done anything that the checkpoint it began with does not hold
    last_words: str = ""  # to be said when the logs are closed, below a terminal's bar and what W&B says

    def loop(self) -> int:
        """Trains to the end, or to the step at which all ranks agree to stop; returns what to report."""
        config, progress = self.config, self.progress
        agreement = Agreement(self.runtime.control)
        meter = TrainMeter(
            self.runtime, self.plan, self.total_steps, progress.seconds, self.step.names, progress.trouble.skips
        )
        trace = Trace(self.folder.trace, self.plan, self.log.warning) if config.trace else None
        timer = SaveTimer(config.checkpoint.every_minutes)
        stream = self.loader.train(self.plan, progress.step, self.total_steps)

        stopping = False
        if self.eval_due():  # the last stop cut it short
            stopping = not self.evaluate(agreement)
            if not stopping:
                self.save()
        self.log.progress("train", progress.step, self.total_steps)
        meter.resume()
        self.budget.resume()
        while progress.step < self.total_steps and not stopping:
            if self.lease is not None:
                self.lease.check()
            lr = self.schedule(progress.step)
            batches = meter.fetch(stream)
            if batches is None:  # somebody asked to stop while the data did not come
                stopping = self.stop_without_data(meter, lr)
                break
            self.unsaved = True
            measure = trace is not None or self.due.record(progress.step + 1)
            result = self.step(batches, progress.step, lr, measure_norm=measure)
            meter.add(*result)
            progress.step += 1
            self.watchdog.beat(progress.step, TRAINING)
            self.replicas.after(progress.step)
            self.log.progress("train", progress.step, self.total_steps)
            if trace is not None:
                trace.step(progress.step, batches, result.loss, result.gradient_norm)
            if self.due.interval(progress.step):
                self.log_records(meter.close_interval(progress.step, lr))
            went_back = self.went_back(meter, lr)

            self.budget.step(self.due.to_evaluation(progress.step))
            overdue = self.checkpointer is not None and self.checkpointer.overdue
            stopping, save = agreement.exchange(stop=STOP.requested(), save=timer.due or overdue)
            if self.eval_due() and not stopping:
                self.log_records(meter.flush(progress.step, lr))
                stopping = not self.evaluate(agreement)
                save = save or progress.best_step == progress.step
                meter.resume()
            if save or stopping or went_back or self.due.save(progress.step):
                self.flush_and_save(meter, lr, last=stopping or progress.step == self.total_steps)
                agreement.answer()
                timer.restart()

        agreement.close()
        if trace is not None:
            trace.close()
        self.watchdog.close()  # the others wait for the last save, however long that takes
        code, final = self.runtime.on_main(lambda: (self.conclude(stopping, meter.images_per_second), STOP.timed))
        self.runtime.on_main(self.copied)
        if code == STOPPED and final:
            end_parent_too(os.environ, self.runtime.local_rank)
        return code

    def copied(self) -> None:
        """Waits until the second place has the last save, too, or takes nothing any more. Rank 0 only."""
        assert self.checkpointer is not None
        self.checkpointer.close()

    def close(self, code: int) -> None:
        """Waits for the save under way, whose failure the log must still hear of, and closes the log."""
        self.watchdog.close()
        if self.checkpointer is not None:
            self.checkpointer.wait()
        self.log.close(FAILED if code == DIVERGED else code)

    def eval_due(self) -> bool:
        """Whether the weights as they are now are to be evaluated and were not."""
        return self.due.evaluation(self.progress.step) and self.progress.evaluated < self.progress.step

    def evaluate(self, agreement: Agreement) -> bool:
        """Evaluates the weights as they are now; False where a request to stop cut it short."""
        progress, plan = self.progress, self.eval_plan
        batches = self.loader.evaluate(plan)

        def tell(done: int, rounds: int) -> None:
            self.watchdog.beat(progress.step, EVALUATION)
            self.log.progress("eval", done, rounds)

        with self.budget.evaluation():
            result = self.evaluator(self.state.weights(), batches, plan, self.runtime, agreement, STOP, tell)
        if result is None:
            return False
        progress.evaluated, progress.result, self.unsaved = progress.step, result, True
        top1 = result.get("ema_top1", result["top1"])
        if top1 > progress.best_top1 and math.isfinite(result["loss"]):
            progress.best_step, progress.best_top1 = progress.step, top1
        epoch = progress.step / self.plan.steps_per_epoch
        best = {"best_step": progress.best_step, "best_top1": progress.best_top1}
        self.log_records([{"kind": "eval", "step": progress.step, "epoch": epoch, **result, **best}])
        return True

    def went_back(self, meter: TrainMeter, lr: float) -> bool:
        """Goes back to a good checkpoint's weights where steps without a number do not stop; whether it did.

        Raises:
            Failure: that does not help; the summary says so.
        """
        progress, trouble = self.progress, self.progress.trouble
        if not self.due.interval(progress.step) or progress.step == self.total_steps:
            return False
        if not self.rescue.due(trouble, progress.finite):
            return False
        self.log_records(meter.flush(progress.step, lr))  # nothing of the time before may be read later
        try:
            self.rescue.go_back(trouble, progress.step)
        except Failure:
            self.runtime.on_main(lambda: self.write_summary("diverged", meter.images_per_second))
            raise
        meter.skips.forget_row()
        progress.finite = True
        return True

    def stop_without_data(self, meter: TrainMeter, lr: float) -> bool:
        """Saves before a step whose data did not come. Alone: other ranks wait within that step by now.

        Raises:
            Failure: there are others.
        """
        if self.runtime.world > 1:
            raise Failure(
                f"{STOP.received}: this rank's data did not come for step {self.progress.step + 1}, so the ranks could "
                f"not save; {same_command()} continues from the newest checkpoint"
            )
        if self.unsaved:
            self.flush_and_save(meter, lr, last=True)
        return True

    def flush_and_save(self, meter: TrainMeter, lr: float, last: bool) -> None:
        """Begins a save, having logged what a restart from it will not measure again. All ranks must call it."""
        self.log_records(meter.flush(self.progress.step, lr))
        self.progress.seconds = meter.seconds
        self.save(last)

    def save(self, last: bool = False) -> None:
        """Begins a save. All ranks must call it: their batch-norm statistics are averaged, and gathered on rank 0.

        While rank 0 still writes, it passes over what is not the ``last`` of this start, and asks for it later.
        """
        self.watchdog.beat(self.progress.step, SAVE)
        self.replicas.compare(self.progress.step)
        self.progress.trouble.saving(self.progress.step, self.progress.finite)
        state = self.state.capture()
        if self.checkpointer is not None:
            config = self.config.model_dump(mode="json")
            header = {"progress": asdict(self.progress), "config": config, "data": self.data, "classes": self.classes}
            good, best, step = self.progress.trouble.good, self.progress.best_step, self.progress.step
            self.checkpointer.save({**header, **state}, step, best, last, good)

    def log_records(self, records: Sequence[dict[str, object]]) -> None:
        """Logs what is ready, and warns at the first step that was passed over and the first loss that is no number."""
        for record in records:
            self.log.record(record)
            if (count := record.get("skipped")) is not None and not self.told_of_skips:
                self.told_of_skips = True
                self.log.warning(words.skipped(int(str(count)), record["step"]))
            finite = math.isfinite(float(str(record["loss"])))
            if self.progress.finite and not finite:
                self.log.warning(words.not_finite(record["loss"], record["step"]))
            self.progress.finite = finite

    def conclude(self, stopping: bool, images_per_second: float) -> int:
        """Waits for the last save, writes the summary, and returns what to report. Rank 0 only."""
        progress = self.progress
        assert self.checkpointer is not None
        assert self.lease is not None
        saved = self.checkpointer.wait()
        self.lease.held()
        self.lease.check()
        diverged = not stopping and not progress.finite
        if self.unsaved and saved != progress.step and not diverged:  # weights that are no numbers are not saved
            self.log.message(f"step {progress.step} could not be saved; the newest checkpoint is older", "error")
            return FAILED
        forget_starts(self.folder.faults)
        status = "stopped" if stopping else "diverged" if diverged else "finished"
        if (self.unsaved or self.folder.summary() is None) and not self.write_summary(status, images_per_second):
            return FAILED
        if stopping:
            self.last_words = (
                f"{STOP.received or 'another rank'}: stopped at step {progress.step}, everything is saved\n"
                f"{same_command()} continues {self.folder.path}"
            )
        elif diverged:
            self.log.message(f"the run ends with a loss that is no number (NaN); {words.REMEDY}", "error")
            self.last_words = f"run folder: {self.folder.path}"
            return DIVERGED
        else:
            self.last_words = self.finished()
        return STOPPED if stopping else FINISHED

    def finished(self) -> str:
        """The last words of a run that has come to its end."""
        progress, checkpoints = self.progress, self.folder.checkpoints
        classes = settled(self.config.model.num_classes)
        if progress.best_step is None:  # no evaluation whose loss was a number
            return words.finished(progress.result, progress.step, classes, None, self.folder.path, not self.unsaved)
        file, link = checkpoint.path_for(checkpoints, progress.best_step), checkpoints / checkpoint.BEST
        if link.resolve() == file.resolve():
            file = link
        best = progress.best_step, progress.best_top1, file
        return words.finished(progress.result, progress.step, classes, best, self.folder.path, not self.unsaved)

    def write_summary(self, status: str, images_per_second: float) -> bool:
        """Whether it could be written."""
        try:
            digest = {"sha256": self.checkpointer.sha256(self.progress.step) if self.checkpointer else None}
            self.folder.write_summary(self.summary(status, images_per_second) | digest)
        except OSError as error:
            self.log.message(f"cannot write summary.json: {error.strerror}; the rest is saved", "error")
            return False
        return True

    def summary(self, status: str, images_per_second: float) -> dict[str, object]:
        """What ``summary.json`` says."""
        progress = self.progress
        return {
            "status": status,
            "step": progress.step,
            "epoch": progress.step / self.plan.steps_per_epoch,
            **{key: value for key, value in progress.result.items() if key != "seconds"},
            "best": {"step": progress.best_step, "top1": progress.best_top1} if progress.best_step else None,
            "images_per_second": images_per_second,
            "seconds": progress.seconds,
        }


def build(asked: Start, leaving: contextlib.ExitStack) -> Run:
    """Makes every part, continues from the newest valid checkpoint where there is one, and says what it resolved.

    What must be let go of, however the run ends, goes to ``leaving``.
    """
    config = asked.config
    folder = RunFolder(config.run.dir)
    if torch.cuda.is_available():
        record_collectives(folder.faults, os.environ)
    runtime = start(asked.place, STOP, config.data.wait_minutes)
    runtime.on_each(lambda: check_network(config))
    check_alike(config, runtime)
    store = runtime.on_main_only(lambda: open_store(config.checkpoint.mirror))
    device, precision = runtime.device, effective_precision(config.train.precision, runtime.device)
    set_up_device(device, precision, config.train.deterministic)
    say = partial(print, file=sys.stdout if runtime.is_main else sys.stderr, flush=True)
    say_once = say if runtime.is_main else (lambda text: None)
    if is_wanted(config.launch.preflight, runtime):
        preflight(runtime, folder.path, say)
    one_checks = runtime.local_rank == 0  # the index's checksum: the machine's ranks share the pages
    indexes = runtime.main_first(
        lambda: open_data(config.data, config.model.num_classes, say_once, STOP.requested, one_checks)
    )
    data = indexes[0].fingerprint if indexes else f"synthetic {config.data.synthetic.train}"
    runtime.check_same(data, "finds other training images than rank 0: is data.root still being copied to?")
    made_up = config.data.synthetic
    images = (len(indexes[0]), len(indexes[1])) if indexes else (made_up.train, made_up.val)
    config = follow(
        config,
        classes=len(indexes[0].classes) if indexes else SYNTHETIC_CLASSES,
        images=images[0],
        gpu=device.type == "cuda",
    )
    seed, eval_batch = config.run.seed, config.data.eval_batch
    plan, eval_plan = make_plans(config.train, seed, images, eval_batch, runtime.rank, runtime.world)
    total_steps = plan.length(config.train.epochs, config.train.steps)

    torch.manual_seed(config.run.seed)
    network = build_model(config.model).to(memory_format=torch.channels_last).to(device)
    if config.optim.freeze is not None:
        freeze(network, config.optim.freeze)
    check_batch_norm(network, plan.smallest_slice, config.data.size)

    if indexes:
        folder.check_apart([index.root for index in indexes])
    names = indexes[0].classes if indexes else None
    classes = settled(config.model.num_classes)
    console = ConsoleSink(total_steps, plan.steps_per_epoch, classes) if runtime.is_main else None
    log = Log([console] if console else [])
    warn = (lambda text: log.warning(text)) if runtime.is_main else say  # of the log as it is then
    make_lease = partial(Lease, folder.path, asked.job or "", asked.starts)
    lease = runtime.on_main_only(lambda: make_lease().acquire(say, STOP.requested))
    if lease is not None:
        leaving.callback(lease.release)
    mirror = Mirror(store, config, warn, log.message) if store is not None else None  # on the rank that writes
    fresh = asked.fresh and not runtime.on_main(
        lambda: folder.is_begun_by(asked.job) or (mirror is not None and mirror.is_begun_by(asked.job))
    )
    if asked.fresh and not fresh:
        log.message(f"--fresh: {asked.job} began this run already, so it goes on")
    found = None if fresh else find_checkpoint(runtime, folder, mirror, asked.must_resume, log)
    if found is not None:
        config = keep(asked.config, config, found[1])
    progress = find_progress(found, config, data, total_steps, log)
    first_weights = ""  # a run that continues needs them no more
    if found is None and config.model.weights is not None:
        first_weights = runtime.main_first(lambda: load_weights(network, config.model, names, say))
        runtime.check_same(checksum(network), f"begins with other weights than rank 0: {first_weights}")
    state_bytes = (3 if config.ema else 2) * sum(4 * p.numel() for p in network.parameters())  # momentum, EMA
    if fresh:  # before the loader, which knows the bad samples of the run that is there
        runtime.on_main(lambda: check_room(folder.checkpoints, state_bytes))
        runtime.on_main(lambda: folder.start_fresh(asked.job, say))
    loader = runtime.on_each(
        lambda: build_loader(
            config.data,
            indexes,
            classes,
            device,
            folder.bad_samples,
            warn,
            notify_once=say_once,
            stop=STOP.requested,
            ranks=runtime.world,
            local_ranks=runtime.local_world,
        )
    )

    # What the user may have got wrong has been looked at: from here on the run folder is written to.
    open_here = partial(open_folder, folder, lease, mirror, config, progress.step, state_bytes, warn)
    checkpointer = runtime.on_main_only(open_here)
    if mirror is not None:
        mirror.begin(progress.wandb_id, asked.job, folder.checkpoints, progress.best_step)
    since = count_start(runtime, folder.faults, asked.job, progress.step, os.environ)
    lr, parameters = peak_lr(config.optim, plan.global_batch), sum(p.numel() for p in network.parameters())
    if console is not None and lease is not None:
        values, batch = config.model_dump(mode="json"), plan.global_batch
        facts = {"learning_rate": lr, "world_size": runtime.world, "global_batch": batch, "parameters": parameters}
        wandb = WandbSink(config.wandb, progress.wandb_id, config.run.name, folder.path, values, facts, warn)
        log = Log([console, JsonlSink(folder.metrics, warn, lease.held), wandb])
    runtime.barrier()  # the traces are cut; the ranks may open them
    lag = 2 * exchange_interval(runtime.world)  # steps until all ranks have heard of a stop
    stacks, act = folder.faults / f"rank_{runtime.rank:05d}.txt", partial(save_collectives, folder.faults, runtime.rank)
    watchdog = Watchdog(stacks, progress.step, config.train.hang_minutes, config.data.wait_minutes, lag, act)
    leaving.callback(watchdog.close)
    end = find_end(config.train.max_minutes, since, os.environ) if runtime.is_main else None  # its watch is all's
    saving = (lambda: checkpointer.seconds) if checkpointer is not None else None

    for line in words.resolved(asked.config, config, runtime, plan, precision, lr, network):
        log.message(line)
    if first_weights:
        log.message(first_weights)

    smoothing, compiled = config.train.label_smoothing, settled(config.train.compile)
    objective = Objective(network, config.data.mean, config.data.std, DTYPES[precision], smoothing).to(device)
    call, ddp = wrap(objective, config.train, runtime)
    if ddp is not None or compiled:
        warm_up(call, ddp, objective, plan.slice_sizes, config.data.size, device)
    optimizer = build_optimizer(network, config.optim, lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    ema = Ema(network, config.ema) if config.ema else None
    state = TrainState(network, optimizer, scaler, ema, runtime)
    schedule = build_schedule(config.schedule, lr, plan.steps_per_epoch, total_steps)
    if not state.continues_exactly:
        log.message(words.mean_alone(runtime.world))
    if found is not None:
        newest, saved = found
        state.restore(saved)
        log.message(f"continuing {newest}: step {progress.step} of {total_steps}")
        before = saved["config"]["train"]
        if not progress.finite:
            log.warning(f"the loss was no number any more when {newest.name} was saved; {words.REMEDY}")
        if progress.step == plan.length(before["epochs"], before["steps"]) < total_steps:
            log.message(words.lengthened(total_steps, schedule(progress.step), newest))
    rescue = Rescue(
        config.train, folder.checkpoints, runtime, state, checkpointer, scaled=scaler.is_enabled(), notify=log.warning
    )
    batch, clip = plan.global_batch, config.train.clip_grad_norm
    layers = dict(network.named_parameters()) if config.log.layers else None
    step = TrainStep(
        call,
        ddp,
        optimizer,
        scaler,
        ema,
        world=runtime.world,
        global_batch=batch,
        clip_grad_norm=clip,
        layers=layers,
        guard=Guard(optimizer, network),
    )
    return Run(
        config=config,
        runtime=runtime,
        folder=folder,
        lease=lease,
        log=log,
        watchdog=watchdog,
        budget=Budget(end, STOP, lag, saving),
        plan=plan,
        eval_plan=eval_plan,
        loader=loader,
        state=state,
        step=step,
        rescue=rescue,
        replicas=Replicas(network, optimizer, ema, runtime, config.train.check_replicas),
        evaluator=Evaluator(objective, ["model", "ema"] if ema else ["model"], compiled),
        checkpointer=checkpointer,
        schedule=schedule,
        due=Due(config, plan, total_steps),
        total_steps=total_steps,
        data=data,
        classes=names,
        progress=progress,
        told_of_skips=scaler.is_enabled() or progress.trouble.skips.total > 0,  # a loss scaler skips as it searches
    )


def check_network(config: Config) -> None:
    """Looks for mistakes in the network's settings before a large data set is listed; only shapes are made.

    Raises:
        UserError: there is no such network, or none of its stages is the one to freeze.
    """
    with torch.device("meta"):
        network = build_model(config.model.model_copy(update={"num_classes": 1}))
    if config.optim.freeze is not None:
        freeze(network, config.optim.freeze)


def main(start: Start) -> int:
    """Returns the exit code: 0 finished, 75 stopped with everything saved, 2 the user's to mend, 1 failed."""
    place = start.place
    try:
        code = train(start)
        return report_exit(code, "the run ends with a loss that is no number (NaN)" if code == DIVERGED else "")
    except UserError as error:
        if place.rank == 0 or not error.everywhere:
            print(f"error: {error}", file=sys.stderr)
        leave()
        return report_exit(USER_ERROR, str(error))
    except Failure as error:
        if place.rank == 0 or not error.everywhere:
            print(f"error: {error}", file=sys.stderr)
        if error.everywhere:  # else another rank may be within a collective
            leave()
        return report_exit(error.code, str(error))
    except KeyboardInterrupt:
        print("interrupted twice; what was trained since the newest checkpoint is not saved", file=sys.stderr)
        return report_exit(FAILED, "interrupted twice; not saved")
    except Exception as error:
        traceback.print_exc()
        return report_exit(FAILED, f"{type(error).__name__}: {error}")


def train(start: Start) -> int:
    """One start of a run, from its parts to its last words; returns what to report."""
    with contextlib.ExitStack() as leaving:
        try:
            run = build(start, leaving)
        except Interrupted:
            if start.place.rank == 0:
                print(
                    f"{STOP.received or 'another rank'}: stopped before the first step; the same command starts again"
                )
            leave()
            return STOPPED
        code = FAILED
        try:
            code = run.loop()
        finally:
            run.close(code)
    leave()
    if run.last_words:
        print(run.last_words, flush=True)
    return code


if START is not None:
    code = main(START)
    STOP.ignore()
    sys.exit(code)
