"""What a run says: records of numbers and messages, to the console, to ``metrics.jsonl`` and to Weights & Biases.

Rank 0 alone has sinks. The other ranks hold an empty ``Log``, so that no caller asks who it is.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import itertools
import math
import netrc
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Protocol, TextIO
from urllib.parse import urlsplit

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distrib.config import TOP5_CLASSES, WandbConfig
from distrib.faults import STOPPED
from distrib.jsonl import JsonlFile

Level = Literal["info", "warning", "error"]
Kind = Literal["train", "eval"]

REDRAW_SECONDS = 0.1  # a bar that moves more often than the eye sees costs the steps their time

# W&B's own patience is 90 s for a start and endless for an end. The start's must end within the end's: a run that
# finishes while it still waits for the server then has time to write its records offline.
INIT_SECONDS = 20.0
CLOSE_SECONDS = 30.0
RETRY_SECONDS = 60.0

BEST = "best_"  # begins what an evaluation's record says of the best one so far

# The public server, which W&B calls by the first name since 0.31, and keys in old .netrc files by the second.
SAME_SERVER = {"api.forge.coreweave.com": "api.wandb.ai"}

# 80 columns hold the bar's fields for 450360 steps, and 100 a line, with an ETA of two-digit hours.
TRAIN_FIELDS = (
    ("epoch", "epoch {:.2f}/{epochs:g}"),
    ("loss", "loss {:.3f}"),
    ("top1", "top-1 {:.1f}%"),
    ("lr", "lr {:.3g}"),
    ("images_per_second", "{:.0f} img/s"),
    ("data_wait", "wait {:.0%}"),
    ("skipped", "{} skipped"),
)
BAR_FIELDS = (*TRAIN_FIELDS[:-2], ("data_wait", "data wait {:.0%}"), TRAIN_FIELDS[-1])  # below the bar there is room
EVAL_FIELDS = (
    ("epoch", "epoch {:.2f}/{epochs:g}"),
    ("kind", "{}"),
    ("top1", "top-1 {:.2f}%"),
    ("top5", "top-5 {:.2f}%"),
    ("loss", "loss {:.3f}"),
    ("ema_top1", "EMA {:.2f}%"),
)


class Sink(Protocol):
    """One place where the log goes."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Takes ``{"kind": "train" | "eval", "step": int, …}``."""

    def progress(self, kind: Kind, done: int, total: int) -> None:
        """Takes where the run is: steps of training, or rounds of the evaluation that is under way."""

    def message(self, text: str, level: Level = "info") -> None:
        """Takes a sentence for a person."""

    def close(self, exit_code: int) -> None:
        """Lets go of files, threads and the terminal."""


class Log:
    """Hands everything to all sinks. No sink ends a run: one that raises is named on the others, and tried again.

    Sinks close in reverse order, so the console goes first in the list and shows what the others say while closing.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = tuple(sinks)
        self._failing: set[Sink] = set()

    def record(self, record: Mapping[str, Any]) -> None:
        """Numbers of one step or one evaluation."""
        self._each(self._sinks, lambda sink: sink.record(record))

    def progress(self, kind: Kind, done: int, total: int) -> None:
        """Steps of training, or rounds of an evaluation, that are done. Cheap: may be called in each of them."""
        self._each(self._sinks, lambda sink: sink.progress(kind, done, total))

    def message(self, text: str, level: Level = "info") -> None:
        """A sentence for a person. Any thread may call it."""
        self._each(self._sinks, lambda sink: sink.message(text, level))

    def warning(self, text: str) -> None:
        """A message that is marked as a warning."""
        self.message(text, "warning")

    def close(self, exit_code: int) -> None:
        """Closes every sink. A second call does nothing."""
        for sink in self._sinks[::-1]:
            self._try(sink, lambda sink: sink.close(exit_code))
            self._sinks = tuple(other for other in self._sinks if other is not sink)

    def _each(self, sinks: Sequence[Sink], action: Callable[[Sink], None]) -> None:
        for sink in sinks:
            self._try(sink, action)

    def _try(self, sink: Sink, action: Callable[[Sink], None]) -> None:
        try:
            action(sink)
        except Exception as error:
            if sink not in self._failing:  # once, until it works again
                self._failing.add(sink)
                others = [other for other in self._sinks if other not in self._failing]
                text = f"{type(sink).__name__} failed, the run goes on without it: {_brief(error)}"
                self._each(others, lambda other: other.message(text, "warning"))
        else:
            self._failing.discard(sink)


class ConsoleSink:
    """A progress bar on a terminal, with messages and evaluations above it; one plain line for each elsewhere.

    Of fewer than six classes a network names five, right or wrong: their top-5 is not shown.
    """

    def __init__(self, total_steps: int, steps_per_epoch: int, classes: int, stream: TextIO | None = None) -> None:
        self._total, self._steps_per_epoch = total_steps, steps_per_epoch
        self._epochs = round(total_steps / steps_per_epoch, 2)
        self._eval_fields = tuple(field for field in EVAL_FIELDS if classes >= TOP5_CLASSES or field[0] != "top5")
        self._stream = sys.stdout if stream is None else stream
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="replace")  # a locale without "×" must not cost the console
        # The stream decides, not rich: it would colour a file where FORCE_COLOR is set.
        fancy = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._console = (
            Console(file=self._stream, force_terminal=True, markup=False, emoji=False, highlight=False)
            if fancy
            else None
        )
        self._live: Live | None = None
        self._drawn = -math.inf  # when
        self._step = 0
        self._rounds: tuple[int, int] | None = None  # done, and of how many, of the evaluation under way
        self._numbers: Mapping[str, Any] = {}  # the last training record
        self._step_seconds = math.nan

    def record(self, record: Mapping[str, Any]) -> None:
        """A training record becomes the bar's numbers; an evaluation stays on the screen."""
        train = record["kind"] == "train"
        if self._console is None:
            fields = self._fields(record, TRAIN_FIELDS if train else self._eval_fields)
            eta = [f"ETA {_duration(record['eta_seconds'])}"] if "eta_seconds" in record else []
            self._line(" ".join([f"{record['step']}/{self._total}", *fields, *eta]))
        elif train:
            self._step = max(self._step, record["step"])  # on a GPU a record comes an interval late
            self._step_seconds = record.get("eta_seconds", math.nan) / max(self._total - record["step"], 1)
            self._numbers = record
            self._draw(self._console)
        else:
            self._rounds = None
            self._draw(self._console)
            self._console.print(Text("  ".join(self._fields(record, self._eval_fields)), style="bold"))

    def progress(self, kind: Kind, done: int, total: int) -> None:
        """Moves the bar on a terminal, as often as can be seen; an evaluation has one of its own while it lasts."""
        if self._console is None:
            return
        if kind == "train":
            self._step, self._rounds = done, None
        else:
            self._rounds = done, total
        if time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw(self._console)

    def message(self, text: str, level: Level = "info") -> None:
        """Prints the message, ``warning:`` or ``error:`` before it."""
        mark = "" if level == "info" else f"{level}: "
        if self._console is None:
            self._line(mark + text)
        else:
            self._console.print(Text.assemble((mark, "bold red" if level == "error" else "bold yellow"), text))

    def close(self, exit_code: int) -> None:
        """Leaves the bar as it stands and gives the terminal back."""
        live, self._live, self._rounds = self._live, None, None
        if live is not None:
            live.update(self._picture())
            live.stop()

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _fields(self, record: Mapping[str, Any], fields: Sequence[tuple[str, str]]) -> list[str]:
        shown = ((text, record.get(key)) for key, text in fields)
        return [text.format(value, epochs=self._epochs) for text, value in shown if value is not None]

    def _draw(self, console: Console) -> None:
        if self._live is None:
            # Without a refresh thread: what is shown changes when we are told, and at no other time. What else is
            # printed goes above the bar, but a stderr that goes to a file keeps going there.
            self._live = Live(
                console=console,
                auto_refresh=False,
                redirect_stdout=self._stream is sys.stdout,
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
            console.show_cursor(True)  # a killed run could not bring it back
        self._live.update(self._picture(), refresh=True)
        self._drawn = time.monotonic()

    def _picture(self) -> Group:
        """The bars, and the last record's numbers below them; the epoch moves with each step."""
        numbers = self._fields({**self._numbers, "epoch": self._step / self._steps_per_epoch}, BAR_FIELDS)
        bars = Table.grid(padding=(0, 2), expand=True)
        bars.add_column(ratio=1)
        for _ in range(3):
            bars.add_column(no_wrap=True, justify="right")
        rows = [(self._step, self._total, f"ETA {_duration((self._total - self._step) * self._step_seconds)}")]
        if self._rounds is not None:
            rows.append((*self._rounds, "evaluation"))
        for done, total, what in rows:
            bars.add_row(ProgressBar(total, done), f"{done}/{total}", f"{100 * done // max(total, 1)}%", what)
        return Group(bars, Text("  ".join(numbers), no_wrap=True, overflow="ellipsis"))


class JsonlSink:
    """One JSON object a line, records only; what a failing disk does not take is written when it does."""

    def __init__(
        self, path: Path, notify: Callable[[str], None] = print, owned: Callable[[], bool] = lambda: True
    ) -> None:
        self._file = JsonlFile(path, notify, owned)

    def record(self, record: Mapping[str, Any]) -> None:
        """Appends the record; it is with the operating system when this returns, or waits for the next one."""
        self._file.append(record)

    def progress(self, kind: Kind, done: int, total: int) -> None:
        """Nothing: the file holds records."""

    def message(self, text: str, level: Level = "info") -> None:
        """Nothing: the file holds numbers."""

    def close(self, exit_code: int) -> None:
        """Closes the file."""
        self._file.close()


def new_run_id() -> str:
    """An id for W&B: the one that a sweep's agent or a launcher has given out, or one of our own.

    Ours is short, and safe in a file name and in a URL.
    """
    return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)


class WandbSink:
    """Weights & Biases. A thread does all that may wait for a network; the caller only fills a queue.

    Whatever goes wrong is told to ``notify`` and the run goes on; without a key or a server W&B writes offline. The
    same ``run_id`` again continues the W&B run, which keeps the steps it has: those that a resumed run repeats are
    not logged twice. ``WANDB_MODE`` wins over ``cfg.mode``.

    ``facts`` go to the run's summary, the row that W&B's tables compare runs by. There too are each metric's last
    value and, from an evaluation's ``best_…``, the best one and its step.
    """

    def __init__(
        self,
        cfg: WandbConfig,
        run_id: str,
        run_name: str,
        run_dir: Path,
        config: dict[str, Any],
        facts: Mapping[str, float],
        notify: Callable[[str], None],
    ) -> None:
        named = os.environ.get("WANDB_MODE") or cfg.mode
        self._mode = {"run": "online", "dryrun": "offline"}.get(named, named)
        if self._mode not in ("online", "offline", "disabled"):
            notify(f"W&B: WANDB_MODE={named} is not online, offline or disabled; it stays {cfg.mode}")
            self._mode = cfg.mode
        os.environ["WANDB_MODE"] = self._mode  # W&B reads it too, and would refuse what we have put right
        self._notify = notify
        self._thread: threading.Thread | None = None
        self._over = False  # nobody reads the queue any more
        self._closing = threading.Event()
        if self._mode == "disabled":
            return
        # W&B's reports about itself wait for its server for up to 20 s when the process exits.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            # Not in the thread: a data loader that forks during an import inherits locks that nobody opens.
            import wandb
        except ImportError as error:
            notify(f"W&B is off: {_brief(error)}")
            return
        self._wandb: Any = wandb
        folder = self._make_folder(cfg.dir, run_dir)
        self._upload = f"wandb sync {folder / 'wandb'}/offline-run-*"
        self._summary = dict(facts)
        self._run_args = {
            "project": cfg.project,
            "entity": cfg.entity,
            "id": run_id,
            "name": cfg.name or run_name,
            "group": cfg.group,
            "tags": cfg.tags,
            "notes": cfg.notes,
            "dir": str(folder),
            "config": config,
            "resume": "allow",
        }
        # SimpleQueue: its put() may interrupt itself, as it does when a signal handler logs.
        self._queue: SimpleQueue[dict[str, Any] | int] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def record(self, record: Mapping[str, Any]) -> None:
        """Queues the record."""
        if self._thread is not None and not self._over:
            self._queue.put(dict(record))

    def progress(self, kind: Kind, done: int, total: int) -> None:
        """Nothing: W&B gets records."""

    def message(self, text: str, level: Level = "info") -> None:
        """Nothing: W&B gets numbers."""

    def close(self, exit_code: int) -> None:
        """Waits until W&B has everything, for at most ``CLOSE_SECONDS``. A second call does nothing.

        With 75 the run is marked as preempted.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        atexit.unregister(self.close)
        self._queue.put(exit_code)
        self._closing.set()
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            self._over = True
            self._kill_service()  # or Python waits for it at exit, without end
            thread.join(2)
            self._notify(f"W&B: given up after {CLOSE_SECONDS:.0f} s; to upload the rest: {self._upload}")

    def _make_folder(self, asked: str | None, run_dir: Path) -> Path:
        """Where W&B may write: it would write to /tmp, without a word, where the folder is missing."""
        if asked is not None:
            folder = Path(os.path.expanduser(asked))
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return folder
            except OSError as error:
                self._notify(f"W&B: cannot make wandb.dir {folder}: {error.strerror}; it writes to {run_dir}")
        run_dir.mkdir(parents=True, exist_ok=True)
        return run_dir

    def _work(self) -> None:
        try:
            run = self._start()
        except Exception:
            run = None  # told with the first item, which tries again
        try:
            item: dict[str, Any] | int = {}
            while not isinstance(item, int):
                item = self._queue.get()
                run = self._deliver(run, item)
        except Exception as error:
            if not self._over:
                self._over = True
                self._notify(f"W&B failed, what is missing stands in metrics.jsonl: {_brief(error)}")
            self._reset()
        else:
            self._over = True
            self._tear_down()

    def _deliver(self, run: Any, item: dict[str, Any] | int) -> Any:
        """Hands ``item`` over, however long W&B is out of order; returns the run that took it.

        W&B's service process is in its own session, out of reach of torchrun's and the terminal's signals. But Slurm
        sends SIGTERM to every process of a job, and the service dies of it: so one new start is tried at once.
        """
        for attempt in itertools.count():
            try:
                if run is None:
                    run = self._start()
                self._hand_over(run, item)
                break
            except Exception as error:
                if self._over or (attempt > 0 and self._closing.is_set()):
                    raise
                run = None
                self._reset()
                if attempt == 1:
                    self._notify(f"W&B failed, the run goes on and W&B is tried again: {_brief(error)}")
                if attempt >= 1:
                    self._closing.wait(RETRY_SECONDS)
        return run

    def _start(self) -> Any:
        try:
            return self._init()
        except Exception as error:
            if self._mode == "offline" or self._over:
                raise
            self._go_offline(_brief(error))
            self._reset()  # the service holds on to the run id and would refuse it
            return self._init()

    def _init(self) -> Any:
        settings = self._wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS)
        session = self._wandb.setup(settings=self._wandb.Settings(silent=True)).settings
        if self._mode == "online" and not getattr(session, "identity_token_file", None):
            settings.api_key = _api_key(session)  # given by hand, W&B never asks for it
            if settings.api_key is None:
                self._go_offline(f"no API key for {session.base_url} (`wandb login`, or set WANDB_API_KEY)")
        hooks = sys.excepthook, sys.exit
        try:
            run = self._wandb.init(**self._run_args, mode=self._mode, settings=settings)
        finally:  # W&B wraps both to learn an exit code, which close() is told; each start adds a printed traceback
            sys.excepthook, sys.exit = hooks
        online = "--include-online " if self._mode == "online" else ""
        self._upload = f"wandb sync {online}{run.settings.sync_dir}"
        # W&B's own exit handler would wait for uploads without end; the handler that comes last runs first.
        atexit.unregister(self.close)
        atexit.register(self.close, 1)
        for kind in ("train", "eval"):
            run.define_metric(f"{kind}/*", step_metric="step")
        run.summary.update(self._summary)
        return run

    def _go_offline(self, reason: str) -> None:
        self._mode = "offline"
        self._notify(f"W&B: {reason}; writing offline, to upload: {self._upload}")

    def _hand_over(self, run: Any, item: dict[str, Any] | int) -> None:
        if isinstance(item, int):
            if item == STOPPED:
                _mark_preempting(run)
            run.finish(exit_code=item)
            return
        history, best = _in_wandbs_names(item)
        run.log(history, step=item["step"])
        if best:
            self._summary |= best  # for a run that is started anew
            run.summary.update(best)

    def _reset(self) -> None:
        self._kill_service()
        self._tear_down()

    def _kill_service(self) -> None:
        # What W&B has not yet sent stays in its folder: the service writes there each 15 s.
        with contextlib.suppress(Exception):  # W&B has no public name for its process
            process = self._wandb.setup()._connection._proc._process
            process.kill()
            process.wait()

    def _tear_down(self) -> None:
        with contextlib.suppress(Exception, SystemExit):  # it exits with the service's code, and complains of its death
            self._wandb.teardown()


def _mark_preempting(run: Any) -> None:
    """Tells W&B that the run goes on later: it is shown as preempted, and a sweep hands it out again.

    Before ``finish``, whose exit code is not 0: W&B takes both together for a preemption. To the end without it where
    this cannot be said: a word that is missing must not cost what is still to be written.
    """
    with contextlib.suppress(Exception):
        run.mark_preempting()


def _in_wandbs_names(record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a record goes to W&B's history, and what to its summary alone."""
    history: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for key, value in record.items():
        if key.startswith(BEST):
            summary[f"best/{key.removeprefix(BEST)}"] = value
        elif key in ("step", "epoch"):
            history[key] = value
        elif isinstance(value, Mapping):  # of each layer
            history |= {f"{record['kind']}/{key}/{name}": inner for name, inner in value.items()}
        elif key != "kind":
            history[f"{record['kind']}/{key}"] = value
    return history, summary


def _api_key(session: Any) -> str | None:
    if session.api_key:
        return str(session.api_key)
    url = urlsplit(session.base_url)
    try:
        file = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser())
    except (OSError, netrc.NetrcParseError):
        return None
    for name in (url.netloc, url.hostname, SAME_SERVER.get(url.netloc)):
        if name and (entry := file.authenticators(name)):
            return entry[2] or None
    return None


def _duration(seconds: float) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"
