"""Which steps are finished: state.json, with the command of each and the SHA-256 of what it read
and wrote.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from common.errors import InputError
from common.files import atomic, sha256_of
from common.reproduction.plan import BATCH_FLAGS, flag_of, typed

ROOT = Path(__file__).resolve().parents[3]
# Flags of the stages that change no result: without a value, and with one.
WITHOUT_EFFECT = {"--grad-checkpointing", "--start-over"}
VALUE_WITHOUT_EFFECT = {
    *("-j", "--workers", "--dist-url", "--dist-backend", "--timeout"),
    *("--log-every", "--checkpoint-every", "--max-skipped", "--max-bad"),
}
RECORD_KEYS = {"command", "typed", "attempts", "needs", "ran", "writes", "seconds", "finished"}
ORPHAN_SECONDS = 120  # how long a killed run's step may take to end


def identity(step):
    """What a step does: its command without the flags that change no result, and the settings of
    its check.
    """
    with_value = VALUE_WITHOUT_EFFECT
    if step.is_stage and not step.trains:
        with_value = with_value | BATCH_FLAGS  # an extraction gives the same rows in any batches
    words = iter(str(word) for word in step.command)
    command = []
    for word in words:
        flag = flag_of(word)
        if flag in with_value:
            if word == flag:
                next(words, None)  # its value
        elif flag not in WITHOUT_EFFECT:
            command.append(word)
    return [*command, step.settings]


class State:
    """The record of a run, kept in a file that is replaced as a whole.

    records: {step: {"command", "typed", "attempts", "needs", "ran", "writes", "seconds",
    "finished", "facts", "score", "curve"}}, where "typed" has the lines that one would type,
    "attempts" the machines, commits and versions, "ran" what stamps() says of the files that an
    unchecked run wrote, or None; digests: {path: [size, time of the last change, SHA-256]}, so that
    nothing is hashed twice.
    """

    def __init__(self, path):
        self.path = path
        self.records = {}
        self.digests = {}
        if path.exists():
            try:
                content = json.loads(path.read_text())
                self.records = content["steps"]
                self.digests = content["digests"]
                for name, record in self.records.items():
                    if RECORD_KEYS - record.keys():
                        raise ValueError(f"the record of {name} is of another version")
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path}: cannot be read ({error}); delete it: the steps then run again, from "
                    f"where their own files are"
                ) from None

    def save(self):
        """Write the file."""
        content = {"steps": self.records, "digests": self.digests}
        with atomic(self.path) as file:
            file.write_text(json.dumps(content, indent=1))

    def digest(self, path):
        """SHA-256 of a file, or of the names in a folder; None where it is missing."""
        path = ROOT / path
        if not path.exists():
            return None
        stamp = stamp_of(path)
        known = self.digests.get(str(path))
        if known and known[:2] == stamp:
            return known[2]
        digest = sha256_of_names(path) if path.is_dir() else sha256_of(path)
        self.digests[str(path)] = [*stamp, digest]
        return digest

    def digests_of(self, paths):
        """{path: SHA-256} of some files."""
        return {str(path): self.digest(path) for path in paths}

    def is_finished(self, step):
        """Whether a step has run with the same command and files, and what it wrote is unchanged.

        Raises InputError where a training run was begun with others: it would be continued.
        """
        record = self.records.get(step.name)
        if record is None:
            return False
        same_command = record["command"] == identity(step)
        needs = self.digests_of(step.needs)
        same_needs = record["needs"] == needs
        if step.trains:
            if not same_command:
                refuse_to_go_on(step, "with another command than now")
            for path, digest in needs.items():
                if digest != record["needs"].get(path):
                    verb = "is missing" if digest is None else "has changed"
                    refuse_to_go_on(step, f"from {path}, which {verb}")
        if not (same_command and same_needs and record["finished"]):
            return False
        return record["writes"] == self.digests_of(step.writes)

    def has_run(self, step):
        """Whether a step that is kept has run with the same command and files, what it wrote is
        unchanged, and only its check is not done.
        """
        record = self.records.get(step.name)
        if record is None or record["ran"] is None:
            return False
        same_command = record["command"] == identity(step)
        same_needs = record["needs"] == self.digests_of(step.needs)
        return same_command and same_needs and record["ran"] == stamps(step.writes)

    def begin(self, step, circumstances):
        """Note that a step begins; a repetition keeps the seconds of the earlier attempts, their
        circumstances, and that one of them has run. circumstances: {"machine", "commit",
        "versions"}, each in words.
        """
        record = {
            "command": identity(step),
            "typed": [*([step.prepared] if step.prepared else []), typed(step.command)],
            "attempts": [circumstances],
            "needs": self.digests_of(step.needs),
            "ran": None,
            "writes": {},
            "seconds": 0,
            "finished": False,
        }
        former = self.records.get(step.name, {})
        same = all(former.get(name) == record[name] for name in ("command", "needs"))
        if same and not former["finished"]:
            record["seconds"] = former["seconds"]
            record["ran"] = former["ran"]
            earlier = [one for one in former["attempts"] if one != circumstances]
            record["attempts"] = [*earlier, circumstances]
        self.records[step.name] = record
        self.save()

    def add_seconds(self, step, seconds):
        """Note how long an attempt took."""
        self.records[step.name]["seconds"] += seconds
        self.save()

    def note_run(self, step):
        """Note that the command of a step that is kept has ended well. It hashes nothing, so that
        hardly any time is left for a kill in between.
        """
        found = stamps(step.writes)
        if step.keeps and None not in found.values():
            self.records[step.name]["ran"] = found
            self.save()

    def finish(self, step, findings):
        """Note that a step and its check are done."""
        record = self.records[step.name]
        record["writes"] = self.digests_of(step.writes)
        record["facts"] = findings.facts
        record["score"] = findings.score
        record["curve"] = findings.curve
        record["finished"] = True
        self.save()


def refuse_to_go_on(step, how):
    """Raise InputError where a training run, begun in another way, has left a checkpoint."""
    folder = ROOT / step.writes[0].parent
    if any(folder.glob("*.pth.tar")):
        raise InputError(
            f"{step.name}: was begun {how}, and would go on in its folder; restore that, give "
            f"another --output, or move {folder} away"
        )


def stamp_of(path):
    """[size, time of the last change] of a file or folder."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def stamps(paths):
    """{path: [size, time of the last change]} of some files, None where one is missing."""
    found = {}
    for path in paths:
        path = ROOT / path
        found[str(path)] = stamp_of(path) if path.exists() else None
    return found


def sha256_of_names(folder):
    """SHA-256 of the sorted names in a folder, 64 hexadecimal digits."""
    names = sorted(os.fsencode(entry.name) for entry in os.scandir(folder))
    return hashlib.sha256(b"\0".join(names)).hexdigest()


def lock(folder):
    """Lock a run's folder against a second run; returns the open file, which steps inherit.

    After a kill, waits for the end of the step that was running: it stops by itself. Raises
    InputError where another run is alive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("a+")
    deadline = time.monotonic() + ORPHAN_SECONDS
    has_said = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            if is_alive(owner) or time.monotonic() > deadline:
                raise InputError(
                    f"{folder}: another run works there (process {owner}); wait for it, or give "
                    f"another --output"
                ) from None
            if not has_said:
                print(
                    f"waiting for the step of a killed run to end, {ORPHAN_SECONDS} s at most",
                    file=sys.stderr,
                    flush=True,
                )
                has_said = True
            time.sleep(0.2)
        except OSError as error:  # a file system without locks
            message = f"cannot be locked against a second run ({error})"
            print(f"warning: {folder}: {message}", file=sys.stderr, flush=True)
            break
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def is_alive(owner):
    """Whether the process of this number (str) is there."""
    try:
        os.kill(int(owner), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
