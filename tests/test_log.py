import contextlib
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs

from distrib.log import ConsoleSink, JsonlSink, Log, _api_key, new_run_id

ROOT = Path(__file__).parent.parent
TRAIN = {
    "kind": "train",
    "step": 123456,
    "epoch": 24.701,
    "loss": 3.4123,
    "top1": 61.234,
    "lr": 0.38712,
    "images_per_second": 10234.4,
    "data_wait": 0.031,
    "gradient_norm": 1.25,
    "seconds": 99.5,
    "eta_seconds": 45296.0,
}
EVAL = {
    "kind": "eval",
    "step": 123456,
    "epoch": 25.0,
    "loss": 0.9612,
    "top1": 76.132,
    "top5": 92.861,
    "images": 50000,
    "seconds": 21.3,
    "ema_top1": 76.331,
    "ema_top5": 93.012,
    "best_step": 120000,
    "best_top1": 76.5,
}
STEPS, STEPS_PER_EPOCH, CLASSES = 450360, 5004, 1000  # 90 epochs


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Memory:
    def __init__(self):
        self.records, self.moves, self.messages, self.closed = [], [], [], []

    def record(self, record):
        self.records.append(dict(record))

    def progress(self, kind, done, total):
        self.moves.append((kind, done, total))

    def message(self, text, level="info"):
        self.messages.append((level, text))

    def close(self, exit_code):
        self.closed.append(exit_code)


class Broken(Memory):
    mended = False

    def record(self, record):
        if not self.mended:
            raise OSError("no space left on device")
        super().record(record)

    def close(self, exit_code):
        super().close(exit_code)
        raise OSError("still no space")


class Scalar:
    def item(self):
        return 2.5


def test_empty_log_takes_everything():
    log = Log()
    log.record(TRAIN)
    log.progress("train", 1, 10)
    log.warning("nobody hears this")
    log.close(0)


@pytest.mark.parametrize("order", [1, -1])
def test_raising_sink_is_reported_once_and_tried_again(order):
    good, broken = Memory(), Broken()
    log = Log([broken, good][::order])
    log.record(TRAIN)
    log.record(EVAL)
    log.message("on it goes")
    log.progress("eval", 2, 5)
    broken.mended = True
    log.record(TRAIN)
    broken.mended = False
    log.record(EVAL)
    log.close(3)
    log.close(4)
    assert good.records == [TRAIN, EVAL, TRAIN, EVAL]
    assert broken.records == [TRAIN]
    assert good.moves == broken.moves == [("eval", 2, 5)]
    assert [level for level, _ in good.messages] == ["warning", "info", "warning"]  # one for each time it fails
    assert "Broken" in good.messages[0][1]
    assert "no space left" in good.messages[0][1]
    assert good.closed == broken.closed == [3]


def test_log_whose_only_sink_raises_goes_on():
    log = Log([Broken()])
    log.record(TRAIN)
    log.record(TRAIN)
    log.close(1)


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    odd = {**TRAIN, "loss": math.nan, "list": [math.inf, 1], "scalar": Scalar(), "path": tmp_path, "none": None}
    for record in (TRAIN, odd, EVAL):
        sink = JsonlSink(path)
        sink.record(record)
        sink.message("not a number")
        assert path.read_bytes().endswith(b"}\n")  # before any close
        sink.close(0)

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]
    assert lines[0] == TRAIN
    assert lines[1] == {**TRAIN, "loss": None, "list": [None, 1], "scalar": 2.5, "path": str(tmp_path), "none": None}
    assert lines[2] == EVAL


def test_console_in_a_file_is_one_plain_line_each(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = tmp_path / "out.txt"
    with path.open("w", encoding="ascii") as file:
        log = Log([ConsoleSink(STEPS, STEPS_PER_EPOCH, CLASSES, file)])
        log.progress("train", 123456, STEPS)
        log.record(TRAIN)
        assert path.read_text().endswith("\n")  # flushed
        log.progress("eval", 3, 7)
        log.record(EVAL)
        log.record({"kind": "train", "step": 5, "loss": math.nan, "eta_seconds": math.nan})
        log.message("8 ranks × 128 images [bf16]")
        log.warning("slow disk")
        log.close(0)
    lines = path.read_text().splitlines()
    assert lines == [
        "123456/450360 epoch 24.70/90 loss 3.412 top-1 61.2% lr 0.387 10234 img/s wait 3% ETA 12:34:56",
        "123456/450360 epoch 25.00/90 eval top-1 76.13% top-5 92.86% loss 0.961 EMA 76.33%",
        "5/450360 loss nan ETA -:--:--",
        "8 ranks ? 128 images [bf16]",
        "warning: slow disk",
    ]
    assert max(map(len, lines)) < 100


@pytest.mark.parametrize(("steps", "words"), [(1000, "/8"), (12, "/0.1"), (38, "/0.3"), (1, "/0.01")])
def test_the_epoch_is_of_all_epochs(steps, words):
    stream = io.StringIO()
    ConsoleSink(steps, 125, 10, stream).record({"kind": "train", "step": 1, "epoch": 1 / 125})
    assert stream.getvalue() == f"1/{steps} epoch 0.01{words}\n"


@pytest.mark.parametrize(("classes", "shown"), [(1, False), (5, False), (6, True)])
def test_top5_of_few_classes_is_not_shown(classes, shown):
    for stream in (io.StringIO(), Terminal()):
        ConsoleSink(10, 10, classes, stream).record(EVAL)
        assert "top-1" in stream.getvalue()
        assert ("top-5" in stream.getvalue()) == shown


@pytest.mark.parametrize("columns", [80, 120])
def test_console_on_a_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    log = Log([ConsoleSink(STEPS, STEPS_PER_EPOCH, CLASSES, terminal)])
    log.message("run directory [runs/x]")
    log.record({**TRAIN, "step": 1, "loss": 9.87})
    log.record(EVAL)
    log.warning("slow disk")
    log.record(TRAIN)
    log.close(0)
    shown = terminal.getvalue()
    assert "\x1b[" in shown
    assert shown.count("\x1b[?25l") <= shown.count("\x1b[?25h")  # the cursor is there again
    lines = plain_lines(shown)
    assert max(map(len, lines)) <= columns
    last = [line for line in lines if line][-2:]
    assert last[0].endswith("123456/450360  27%  ETA 12:34:56")
    assert last[1] == "epoch 24.67/90  loss 3.412  top-1 61.2%  lr 0.387  10234 img/s  data wait 3%"
    for once in (
        "run directory [runs/x]",
        "epoch 25.00/90  eval  top-1 76.13%  top-5 92.86%  loss 0.961  EMA 76.33%",
        "warning: slow disk",
    ):
        assert lines.count(once) == 1


def plain_lines(shown):
    """What a terminal was given, line by line, without its codes."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n")
    return [line.rstrip() for line in plain.split("\n")]


class Bar:
    """A console on a terminal, and what it writes from one call to the next. ``now``: the clock, in seconds."""

    def __init__(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("distrib.log.time", SimpleNamespace(monotonic=lambda: self.now))
        self.now, self.terminal, self.seen = 100.0, Terminal(), 0
        self.sink = ConsoleSink(40, 10, 10, self.terminal)

    def written(self):
        """The lines since the last call that hold something."""
        text = self.terminal.getvalue()[self.seen :]
        self.seen += len(text)
        return [line.strip("━╸╺ ") for line in plain_lines(text) if line]


@pytest.fixture
def bar(monkeypatch):
    return Bar(monkeypatch)


def test_the_bar_moves_from_the_first_step_on(bar):
    bar.sink.progress("train", 0, 40)
    assert bar.written() == ["0/40  0%  ETA -:--:--", "epoch 0.00/4"]
    bar.now += 1
    bar.sink.progress("train", 1, 40)
    assert bar.written() == ["1/40  2%  ETA -:--:--", "epoch 0.10/4"]
    bar.sink.record({"kind": "train", "step": 1, "epoch": 0.1, "loss": 2.5, "top1": 12.5, "eta_seconds": 390.0})
    assert bar.written() == ["1/40  2%  ETA 0:06:30", "epoch 0.10/4  loss 2.500  top-1 12.5%"]
    bar.now += 1
    bar.sink.progress("train", 20, 40)
    assert bar.written() == ["20/40  50%  ETA 0:03:20", "epoch 2.00/4  loss 2.500  top-1 12.5%"]


def test_a_late_record_does_not_move_the_bar_back(bar):
    bar.sink.progress("train", 20, 40)
    bar.written()
    bar.sink.record({"kind": "train", "step": 10, "epoch": 1.0, "loss": 2.5, "eta_seconds": 300.0})
    assert bar.written() == ["20/40  50%  ETA 0:03:20", "epoch 2.00/4  loss 2.500"]


def test_quick_steps_are_not_all_drawn(bar):
    drawn = 0
    for step in range(1, 40):
        bar.now += 0.025
        bar.sink.progress("train", step, 40)
        drawn += bool(bar.written())
    assert 8 <= drawn <= 11  # in a second
    bar.sink.progress("train", 40, 40)
    assert bar.written() == []
    bar.sink.close(0)
    assert bar.written()[-2:] == ["40/40  100%  ETA -:--:--", "epoch 4.00/4"]  # the end is


@pytest.mark.parametrize("end", ["record", "stopped", "closed"])
def test_an_evaluation_has_a_bar_while_it_lasts(bar, end):
    bar.sink.progress("train", 10, 40)
    bar.written()
    for done in (0, 3):
        bar.now += 1
        bar.sink.progress("eval", done, 5)
        train, evaluation, numbers = bar.written()
        assert re.sub(" +", " ", train) == "10/40 25% ETA -:--:--"
        assert re.sub(" +", " ", evaluation) == f"{done}/5 {20 * done}% evaluation"
        assert numbers == "epoch 1.00/4"
    bar.now += 1
    if end == "record":
        bar.sink.record(EVAL)
    elif end == "stopped":
        bar.sink.progress("train", 11, 40)
    else:
        bar.sink.close(0)
    assert not any("evaluation" in line for line in bar.written())


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    log = Log([ConsoleSink(10, 10, 10, terminal)])
    log.progress("train", 1, 10)
    log.record({**TRAIN, "step": 1})
    log.close(0)
    assert terminal.getvalue().startswith("1/10 epoch")
    assert "\x1b" not in terminal.getvalue()


def test_layers_norms_are_in_the_file_and_not_in_the_console(tmp_path):
    stream = io.StringIO()
    console, file = ConsoleSink(STEPS, STEPS_PER_EPOCH, CLASSES, stream), JsonlSink(tmp_path / "metrics.jsonl")
    for norms in ({}, {"gradient_norms": {"conv1.weight": 1.5, "fc.bias": math.inf}}):
        for sink in (console, file):
            sink.record({**TRAIN, **norms})
    file.close(0)
    plain, with_norms = stream.getvalue().splitlines()
    assert plain == with_norms
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [TRAIN, {**TRAIN, "gradient_norms": {"conv1.weight": 1.5, "fc.bias": None}}]


def test_run_ids_differ_and_are_safe(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    ids = {new_run_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"[a-z0-9]{8}", run_id) for run_id in ids)


def test_a_run_id_that_is_given_out_is_taken(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "trial-7")
    assert new_run_id() == "trial-7"
    monkeypatch.setenv("WANDB_RUN_ID", "")
    assert re.fullmatch(r"[a-z0-9]{8}", new_run_id())


def test_a_run_measures_what_is_known_to_end_and_names_its_best(tmp_path):
    folder = tmp_path / "run"
    words = [
        "data.classes=3-dress,4-coat,6-shirt,8-bag,9-ankle-boot",
        "train.steps=8",
        "train.eval_every_epochs=0.0375",
    ]  # each 3 steps
    printed = runs.train(1, folder, *words)
    records = runs.records(folder, "train")
    assert [(r["step"], "gradient_norm" in r) for r in records] == [(step, True) for step in (3, 5, 6, 8)]
    assert all(0 <= r["top1"] <= 100 and r["gradient_norm"] > 0 for r in records)
    evaluated = runs.records(folder, "eval")
    best = max(evaluated, key=lambda r: r["ema_top1"])  # the first, of several
    assert [r["best_top1"] for r in evaluated] == [max(r["ema_top1"] for r in evaluated[: k + 1]) for k in range(3)]
    assert evaluated[-1]["best_step"] == best["step"]
    assert "top-5" not in printed  # of five classes
    assert "evaluation" not in printed  # that is the terminal's
    assert "epoch 0.04/0.1 loss" in printed

    checkpoints = folder / "checkpoints"
    link = checkpoints / "best.pt"
    assert link.readlink() == Path(f"step_{best['step']:08d}.pt")
    said = f"best: EMA top-1 {best['ema_top1']:.2f} % at step {best['step']}, "
    assert printed.splitlines()[-2:] == [f"{said}{link}", f"run folder: {folder}"]
    link.unlink()  # as on a disk that knows none
    assert f"{said}{checkpoints}/step_{best['step']:08d}.pt" in runs.train(1, folder, *words)


# W&B keeps state for the whole process, so each of these is a process of its own, as a run is.

HEAD = """
import os, sys, time
from pathlib import Path
import distrib.log as log
from distrib.config import WandbConfig

FACTS = {"learning_rate": 0.4, "world_size": 8, "global_batch": 1024, "parameters": 25557032}

def make(mode="online", **settings):
    notify = lambda text: print("NOTICE", text, flush=True)
    cfg, config = WandbConfig(mode=mode, **settings), {"optim": {"lr": 0.1}}
    return log.WandbSink(cfg, "abc12345", "a run", Path("run"), config, FACTS, notify)

def record(sink, step):
    sink.record({"kind": "train", "step": step, "epoch": step / 10, "loss": float("nan")})

def timed(what, limit, action):
    start = time.monotonic()
    action()
    assert time.monotonic() - start < limit, f"{what} took {time.monotonic() - start:.1f} s"
"""
KEY = "0123456789" * 4


def run_wandb(tmp_path, body, returncode=0, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "NETRC"))}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(body)],
        env=clean | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | env,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == returncode, done.stderr
    if not returncode:
        assert done.stderr == ""
    assert all(line.startswith("NOTICE") for line in done.stdout.splitlines())  # W&B itself says nothing
    return done.stdout.splitlines(), done.stderr


def messages(data):
    """What a .wandb file holds: LevelDB's log format after 7 bytes of W&B's own."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def stored(tmp_path, folder="run"):
    """The records in W&B's files, one list a file."""
    from wandb.proto.wandb_internal_pb2 import Record

    return [
        [Record.FromString(message) for message in messages(path.read_bytes())]
        for path in sorted((tmp_path / folder / "wandb").glob("*run-*-abc12345/run-abc12345.wandb"))
    ]


def history(tmp_path):
    """The steps that lie in W&B's files, folder by folder."""
    return [
        [
            int(item.value_json)
            for record in records
            for item in record.history.item
            if (item.key or item.nested_key[0]) == "step"
        ]
        for records in stored(tmp_path)
    ]


def summary(records):
    """A run's summary as it is in the end: what one file's records have set."""
    values = {}
    for record in records:
        for item in record.summary.update:
            values[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return values


@pytest.fixture
def silent_server():
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def accept():
            with contextlib.suppress(OSError):  # closed: the test is over
                while True:
                    held.append(server.accept())

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("machine", "base_url", "found"),
    [
        ("api.wandb.ai", "https://api.wandb.ai", True),
        ("api.wandb.ai", "https://api.forge.coreweave.com", True),
        ("wandb.example:8080", "http://wandb.example:8080/", True),
        ("wandb.example", "http://wandb.example:8080", True),
        ("api.wandb.ai", "http://wandb.example", False),
        ("wandb.example login", "http://wandb.example", False),  # not a netrc file
    ],
)
def test_api_key_from_netrc_is_its_own_servers(machine, base_url, found, tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    session = SimpleNamespace(api_key=None, base_url=base_url)
    assert _api_key(session) is None
    (tmp_path / "netrc").write_text(f"machine {machine} login user password {KEY}\n")
    assert _api_key(session) == (KEY if found else None)
    session.api_key = "environment"
    assert _api_key(session) == "environment"


@pytest.mark.parametrize("env", [{}, {"WANDB_MODE": "disabled"}])
def test_wandb_disabled_is_never_imported(tmp_path, env):
    notices, _ = run_wandb(
        tmp_path,
        f"""
        sink = make({"online" if env else "disabled"!r})
        record(sink, 1)
        sink.close(0)
        assert "wandb" not in sys.modules
        """,
        **env,
    )
    assert notices == []
    assert not (tmp_path / "run").exists()


def test_wandb_offline_and_again_with_the_same_id(tmp_path):
    body = """
        sink = make("offline")
        for step in (1, 2, 3):
            record(sink, step)
        sink.record({"kind": "eval", "step": 3, "epoch": 0.3, "top1": 70.0})
        timed("close", 20, lambda: sink.close(0))
        sink.close(0)
        """
    assert run_wandb(tmp_path, body)[0] == []
    assert run_wandb(tmp_path, body)[0] == []
    assert history(tmp_path) == [[1, 2, 3], [1, 2, 3]]


def test_wandb_summary_has_what_runs_are_compared_by(tmp_path):
    body = """
        sink = make("offline")
        best = {"best_step": 1, "best_top1": 70.0}
        norms = {"gradient_norm": 2.5, "gradient_norms": {"conv1.weight": 1.5, "fc.bias": 2.0}}
        sink.record({"kind": "train", "step": 1, "epoch": 0.1, "top1": 60.0, **norms})
        sink.record({"kind": "eval", "step": 1, "epoch": 0.1, "top1": 70.0, **best})
        sink.record({"kind": "train", "step": 2, "epoch": 0.2, "top1": 61.0, "gradient_norm": 1.5})
        sink.record({"kind": "eval", "step": 2, "epoch": 0.2, "top1": 68.0, **best})
        sink.record({"kind": "train", "step": 3, "epoch": 0.3, "top1": 62.0})
        sink.close(0)
        """
    assert run_wandb(tmp_path, body)[0] == []
    (records,) = stored(tmp_path)
    found = summary(records)
    assert {key: value for key, value in found.items() if not key.startswith("_")} == {
        "learning_rate": 0.4,
        "world_size": 8,
        "global_batch": 1024,
        "parameters": 25557032,
        "step": 3,
        "epoch": 0.3,
        "train/top1": 62.0,
        "train/gradient_norm": 1.5,
        "train/gradient_norms/conv1.weight": 1.5,
        "train/gradient_norms/fc.bias": 2.0,
        "eval/top1": 68.0,
        "best/step": 1,
        "best/top1": 70.0,
    }
    names = {item.key or "/".join(item.nested_key) for record in records for item in record.history.item}
    assert {"step", "epoch", "train/top1", "train/gradient_norm", "eval/top1"} <= names
    assert not any("best" in name for name in names)


@pytest.mark.parametrize(("code", "marked"), [(75, True), (0, False), (1, False), (2, False)])
def test_wandb_hears_of_a_stop_that_goes_on_later(code, marked, tmp_path):
    notices, _ = run_wandb(tmp_path, f"sink = make('offline')\nrecord(sink, 1)\nsink.close({code})\n")
    assert notices == []
    (records,) = stored(tmp_path)
    kinds = [record.WhichOneof("record_type") for record in records]
    assert ("preempting" in kinds) == marked
    if marked:
        assert kinds.index("preempting") < kinds.index("exit")  # the service reads in this order
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [code]


@pytest.mark.parametrize("way", ["older", "raises"])
def test_wandb_that_cannot_be_told_of_a_stop_ends_as_ever(way, tmp_path):
    body = f"""
        from wandb.sdk.wandb_run import Run
        def fail(run):
            raise RuntimeError("no service")
        sink = make("offline")
        record(sink, 1)
        while sink._wandb.run is None:
            time.sleep(0.1)
        if {way!r} == "older":
            del Run.mark_preempting
        else:
            Run.mark_preempting = fail
        timed("close", 20, lambda: sink.close(75))
        """
    assert run_wandb(tmp_path, body)[0] == []
    assert history(tmp_path) == [[1]]
    (records,) = stored(tmp_path)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [75]


def test_wandb_gets_the_names_that_are_asked_for(tmp_path):
    body = """
        named = {"name": "a trial", "group": "rates", "tags": ("one", "two"), "notes": "why", "dir": "~/else/where"}
        sink = make("offline", **named)
        record(sink, 1)
        sink.close(0)
        sink = make("offline")
        record(sink, 1)
        sink.close(0)
        """
    # A launcher's id is for a new run; the sink is told the one that this run has.
    assert run_wandb(tmp_path, body, WANDB_RUN_ID="trial-7", WANDB_DIR=str(tmp_path / "nowhere"))[0] == []
    (there,) = stored(tmp_path, "else/where")
    (run,) = (record.run for record in there if record.HasField("run"))
    assert (run.run_id, run.display_name, run.run_group) == ("abc12345", "a trial", "rates")
    assert (list(run.tags), run.notes) == (["one", "two"], "why")
    (here,) = stored(tmp_path)
    (run,) = (record.run for record in here if record.HasField("run"))
    assert (run.display_name, run.run_group, list(run.tags), run.notes) == ("a run", "", [], "")
    assert not (tmp_path / "nowhere").exists()


def test_wandb_writes_to_the_run_where_its_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    body = """
        sink = make("offline", dir="file/wandb")
        record(sink, 1)
        sink.close(0)
        """
    (notice,), _ = run_wandb(tmp_path, body)
    assert "cannot make wandb.dir file/wandb: Not a directory; it writes to run" in notice
    assert history(tmp_path) == [[1]]


def test_wandb_mode_of_the_environment_wins(tmp_path):
    body = "sink = make('disabled')\nrecord(sink, 1)\nsink.close(0)\n"
    assert run_wandb(tmp_path, body, WANDB_MODE="offline")[0] == []
    assert history(tmp_path) == [[1]]
    notices, _ = run_wandb(tmp_path, body, WANDB_MODE="of-line")
    assert len(notices) == 1
    assert "WANDB_MODE=of-line" in notices[0]


def test_wandb_online_without_a_key_goes_offline(tmp_path):
    # Another server's key is no key. And an exception after the start is told by Python alone, once.
    (tmp_path / ".netrc").write_text(f"machine other.example login user password {KEY}\n")
    body = """
        sink = make()
        record(sink, 1)
        timed("close", 20, lambda: sink.close(1))
        raise ValueError("the run's own")
        """
    notices, stderr = run_wandb(tmp_path, body, returncode=1)
    assert len(notices) == 1
    assert "no API key for https://" in notices[0]
    assert "wandb sync run/wandb/offline-run-*" in notices[0]
    assert stderr.count("Traceback") == 1
    assert history(tmp_path) == [[1]]


def test_wandb_goes_offline_where_the_server_never_answers(tmp_path, silent_server):
    (tmp_path / ".netrc").write_text(f"machine {silent_server[7:]} login user password {KEY}\n")
    body = """
        log.INIT_SECONDS = 3
        sink = make()
        timed("record", 1, lambda: [record(sink, step) for step in range(1000)])
        time.sleep(1)
        timed("close", 15, lambda: sink.close(0))
        """
    notices, _ = run_wandb(tmp_path, body, WANDB_BASE_URL=silent_server)
    assert len(notices) == 1
    assert "offline" in notices[0]
    assert list(range(1000)) in history(tmp_path)


def test_wandb_close_is_bounded_and_so_is_the_exit(tmp_path, silent_server):
    body = """
        log.CLOSE_SECONDS = 2
        sink = make()
        record(sink, 1)
        timed("close", 6, lambda: sink.close(0))
        """
    start = time.monotonic()
    notices, _ = run_wandb(tmp_path, body, WANDB_BASE_URL=silent_server, WANDB_API_KEY=KEY)
    assert time.monotonic() - start < 15
    assert len(notices) == 1
    assert "given up after 2 s" in notices[0]


def test_wandb_with_a_wrong_key_goes_offline(tmp_path):
    notices, _ = run_wandb(
        tmp_path, "sink = make()\nrecord(sink, 1)\nsink.close(0)\n", WANDB_API_KEY="short", NETRC="/nowhere"
    )
    assert len(notices) == 1
    assert "offline" in notices[0]
    assert history(tmp_path) == [[1]]


def test_wandb_service_outlives_the_group_and_is_replaced_when_it_dies(tmp_path):
    body = """
        import signal
        sink = make("offline")
        record(sink, 1)
        while sink._wandb.run is None or sink._queue.qsize():
            time.sleep(0.1)
        service = sink._wandb.setup()._connection._proc._process
        assert os.getsid(service.pid) == service.pid != os.getsid(0)  # no killpg reaches it
        os.kill(service.pid, signal.SIGTERM)  # as Slurm does
        service.wait()
        time.sleep(0.5)
        record(sink, 2)
        timed("close", 20, lambda: sink.close(0))
        """
    assert run_wandb(tmp_path, body)[0] == []
    assert history(tmp_path)[-1] == [2]
