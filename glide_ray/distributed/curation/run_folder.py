"""The folder that a run of `glide clean` or `glide filter apply` writes: one owner, resumable.

MARKER names the run by a hash of its source and settings, and the folder of its own files, which is
new for each run that is not resumed. Readers refuse a folder that has a marker.

The owners of a run are counted: `.work/owner-0.json` is written if it does not exist, and a later
process writes `owner-1.json` only once the process of `owner-0.json` has ended. A process on the
same machine is looked up by its id and start; for one elsewhere, its beat is watched, a counter
that the owner writes every BEAT_SECONDS. No clocks are compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import psutil

from ... import storage
from ...data.shards import MARKER, WORK, begin, claim_earlier, shard_name
from ...errors import UserError
from ..rows import RECORD

BEAT_SECONDS = 20.0
SILENT_BEATS = 3  # intervals without a beat after which an owner elsewhere has ended
PLAN = "plan.json"  # number of the shards that the run writes


class RunFolder:
    """An output folder that this process owns. `work` is the folder of the run's own files."""

    def __init__(self, out: str, work: str, number: int):
        self.out, self.work, self.number = out, work, number
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise UserError if another process has taken the folder, which this one was too slow for.

        A suspended machine, for example, writes no beats.
        """
        if _read(_owner(self.out, self.number + 1)) is not None:
            raise UserError(
                f"Another process has continued the work in {self.out}, since this one was silent "
                f"for {SILENT_BEATS * BEAT_SECONDS:.0f} s."
            )

    def release(self) -> None:
        """Let the next process take the folder at once."""
        self._ended.set()
        self._thread.join()
        with suppress(storage.StorageError):  # the next process then waits for the beats
            storage.put(b'"ended"', _beats(self.out, self.number))

    def stop(self) -> None:
        """Write no more beats, because `finish` deletes the folder of the run."""
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        for beat in count():
            with suppress(storage.StorageError):
                storage.put(json.dumps(beat).encode(), _beats(self.out, self.number))
            if self._ended.wait(BEAT_SECONDS):
                return


@contextmanager
def own(out: str, settings: Any) -> Iterator[RunFolder]:
    """Own the folder `out` for the run that `settings` describe: a new one, or one to resume.

    An unfinished run of other settings is replaced, if its process has ended. Raises UserError if
    it has not, and ShardError if the folder holds shards of others.
    """
    digest = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:16]
    marker = {"run": digest, "folder": uuid.uuid4().hex[:8]}
    if _read(f"{out}/{MARKER}") is None:
        # Files of a finished run may remain, or another process may begin at the same time.
        begin(out, json.dumps(marker).encode())
    number = _take(out)
    folder = RunFolder(out, _resume_or_replace(out, marker), number)
    try:
        claim_earlier(out)
        storage.remove(f"{out}/{RECORD}")  # describes rows that are overwritten
        yield folder
    except BaseException:
        folder.release()
        raise


def _resume_or_replace(out: str, marker: dict[str, str]) -> str:
    """Folder of the unfinished run, or of this one if the unfinished one has other settings.

    The shards of the replaced run may then be deleted.
    """
    found = _read(f"{out}/{MARKER}") or {}
    if found.get("run") != marker["run"]:
        other = f"{out}/{WORK}/{found['folder']}" if "folder" in found else None
        plan = (_read(f"{other}/{PLAN}") if other else None) or {}
        claim_earlier(out, map(shard_name, range(plan.get("shards", 0))))
        storage.put(json.dumps(marker).encode(), f"{out}/{MARKER}")
        if other:
            storage.remove_folder(other)
        found = marker
    return f"{out}/{WORK}/{found['folder']}"


def _take(out: str) -> int:
    """Become the next owner. Returns its number. Raises UserError while the last one works."""
    me = json.dumps(_this_process()).encode()
    number = 0
    while True:
        owner = _read(_owner(out, number))
        if owner is None:
            if storage.put_new(me, _owner(out, number)):
                return number
        elif _read(_owner(out, number + 1)) is not None or _has_ended(out, number, owner):
            number += 1
        else:
            raise UserError(
                f"{out} is being written by process {owner.get('pid')} on {owner.get('host')}; "
                "wait for it, or write to another folder."
            )


def _has_ended(out: str, number: int, owner: dict[str, Any]) -> bool:
    if _read(_beats(out, number)) == "ended":
        return True
    if owner.get("machine") == _machine():
        try:
            return psutil.Process(owner["pid"]).create_time() != owner["started"]
        except (psutil.Error, KeyError):
            return True
    first = _read(_beats(out, number))
    for _ in range(SILENT_BEATS):
        time.sleep(BEAT_SECONDS)
        if _read(_beats(out, number)) != first:
            return _read(_beats(out, number)) == "ended"
    return True


def _this_process() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "pid": process.pid,
        "started": process.create_time(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "token": uuid.uuid4().hex,
    }


def _machine() -> str:
    """Identity of this machine since it booted, and of the container that numbers its processes."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not on macOS
        with open("/proc/sys/kernel/random/boot_id") as file:
            parts.append(file.read().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _owner(out: str, number: int) -> str:
    return f"{out}/{WORK}/owner-{number}.json"


def _beats(out: str, number: int) -> str:
    return f"{out}/{WORK}/beat-{number}.json"


def _read(path: str) -> Any:
    """Content of a JSON file, or None if there is none."""
    try:
        return json.loads(storage.read(path))
    except storage.MissingError:
        return None
    except ValueError:
        return {}
