"""Run the steps one after the other, each as a process of its own."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from common.errors import InputError
from common.reproduction.plan import typed

ROOT = Path(__file__).resolve().parents[3]
STOPPED = 75  # exit code of a stage that was told to stop
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CLEAR_LINE = "\x1b[K"
SECONDS_BETWEEN_RECORDS = 60  # of the time that a step takes, which a kill would lose
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Stopped(Exception):
    """The run was told to stop. code: its exit code."""

    def __init__(self, code):
        super().__init__(code)
        self.code = code


def stop_before_steps(number, frame):
    """Signal handler for the time before any step runs, such as while torch looks for GPUs."""
    raise Stopped(STOPPED)


class Runner:
    """Runs steps; passes signals to the one that is running.

    state: of the run; circumstances: {"machine", "commit", "versions"} in words, to be recorded;
    folder: for the logs; lock: the open file that keeps other runs out; hidden: whether the steps
    are to see no GPU.
    """

    def __init__(self, state, circumstances, folder, lock, hidden):
        self.state = state
        self.circumstances = circumstances
        self.folder = folder
        self.lock = lock
        self.environment = os.environ | {"TQDM_MININTERVAL": "1", "PYTHONUNBUFFERED": "1"}
        if hidden:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        self.process = None
        self.step = None
        self.counted = None  # when the time of the running step was last recorded
        self.stopped_by = None
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number, frame):
        """Pass the first signal on. A stage saves at SIGTERM; the other commands clean up at
        SIGINT.
        """
        if self.stopped_by is None:
            self.stopped_by = number
            self.pass_on()

    def pass_on(self):
        """Have the running step stop."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM if self.step.is_stage else signal.SIGINT)

    def run(self, steps):
        """Run what is not finished. Raises InputError where a step or its check fails, Stopped
        after a signal.
        """
        for number, step in enumerate(steps, 1):
            title = f"{number:02}-{step.name}"
            if self.state.is_finished(step):
                print(f"{title}: done before", flush=True)
                continue
            self.run_step(step, title)

    def run_step(self, step, title):
        """Run a step and its check."""
        has_run = self.state.has_run(step)
        self.state.begin(step, self.circumstances)
        self.counted = time.monotonic()
        log = self.folder / f"{title}.log"
        if step.prepare:
            try:
                step.prepare()
            except OSError as error:  # Pillow's does not name the file
                raise InputError(
                    f"{title}: {self.folder} cannot be written ({error}); make room, and the same "
                    f"command goes on"
                ) from error
        if not has_run:
            self.execute(step, title, log)
        findings = step.check(log=log)
        self.state.finish(step, findings)
        seconds = self.state.records[step.name]["seconds"]
        print(f"{title}: {clock(seconds)}; {'; '.join(findings.facts)}", flush=True)

    def execute(self, step, title, log):
        """Run a step's command to its end. Raises InputError where it fails, Stopped after a
        signal.
        """
        code = self.start_and_wait(step, title, log)
        self.count_time(step)
        if code in step.accepts:
            self.state.note_run(step)
        if self.stopped_by is not None or code == STOPPED:
            raise Stopped(130 if self.stopped_by == signal.SIGINT else STOPPED)
        if code not in step.accepts:
            failure = f"{title}: ended with code {code}: {last_line(log)} (all of it: {log})"
            parts = [failure, step.remedy, "the same command goes on when that is repaired"]
            raise InputError("; ".join(part for part in parts if part))
        for path in step.writes:
            if not (ROOT / path).exists():
                raise InputError(f"{title}: did not write {path}; look at {log}")

    def count_time(self, step):
        """Add to the record what has passed since this was last called."""
        now = time.monotonic()
        self.state.add_seconds(step, now - self.counted)
        self.counted = now

    def start_and_wait(self, step, title, log):
        """Run a step's command, its output added to the log; returns the exit code."""
        command = [str(part) for part in step.command]
        if command[0] == "python":
            command[0] = sys.executable
        if self.stopped_by is not None:
            return STOPPED
        with log.open("ab") as file:
            file.write(f"\n$ {typed(step.command)}\n".encode())
            file.flush()
            self.step = step
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through this process alone
                pass_fds=[self.lock.fileno()],
                preexec_fn=end_with_parent,
            )
        if self.stopped_by is not None:  # between the two lines above
            self.pass_on()
        return self.wait(title, log)

    def wait(self, title, log):
        """Wait for the running process. On a terminal its own last line, mostly a progress bar, is
        shown beside the elapsed time.
        """
        start = time.monotonic()
        while True:
            try:
                code = self.process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                said = last_line(log) or "starting"
                show(f"{title} {clock(time.monotonic() - start)}  {said}")
                if time.monotonic() - self.counted > SECONDS_BETWEEN_RECORDS:
                    with suppress(OSError):  # of a full disk the step itself has more to say
                        self.count_time(self.step)
                continue
            show("")
            self.process = None
            return code


def show(text):
    """Put a text in the place of the last one, where stderr is a terminal."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{CLEAR_LINE}{text[:width]}", end="", file=sys.stderr, flush=True)


def end_with_parent():
    """Have the kernel send SIGTERM to this process when its parent dies, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def last_line(log):
    """The last line that a step's last run wrote, an error where there is one near the end; ""
    where it wrote none yet.
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        text = file.read().decode(errors="replace")
    _, begins, run = text.rpartition("\n$ ")
    if begins:
        text = run.partition("\n")[2]  # without the command
    text = text.replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines or [""])[-1]


def clock(seconds):
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
