"""Checkpoints written during training: each rank uploads its shard in a background thread.

A checkpoint is complete once all shards have been uploaded. The ranks find out through one small
all-reduce per step, whose result is read one step later, so that no rank waits for it.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from .. import storage
from .checkpoint import Checkpoints, Manifest
from .collectives import all_gather_object, broadcast_object

CONTINUES = "Training continues, and the next checkpoint is tried."
# Notices that a rank gives with its status; of several, the highest counts. SAVE: a checkpoint is
# due; LEAVING: a node is about to be removed; CHANGE: other workers take over; STOP: the run ends.
NONE, SAVE, LEAVING, CHANGE, STOP = range(5)
WAIT_SECONDS = 1.0  # seconds of waiting for an upload that are worth a line in the log


class RankStatus(NamedTuple):
    """A rank's status after a step.

    `done`: number of the last checkpoint whose upload has ended, successfully or not; `faulty`:
    number of the last checkpoint that could not be written; `notice`: NONE, SAVE and so on.
    Checkpoints are numbered from 1 since this start.
    """

    done: int = 0
    faulty: int = 0
    notice: int = NONE


class StatusReduce:
    """Asynchronous all-reduce of the rank statuses, on a gloo group of its own on the CPU.

    `timeout` in seconds.
    """

    def __init__(self, timeout: float):
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if several else 0
        self.group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if several else None
        )
        self._sent, self._work = torch.zeros(3, dtype=torch.int64), None

    def exchange(self, status: RankStatus) -> RankStatus:
        """Send this rank's status and return the reduced statuses of the previous exchange.

        Minimum over ranks of `done`, maximum of `faulty` and `notice`.
        """
        if self._work is not None:
            self._work.wait()
        done, faulty, notice = self._sent.tolist()
        self._sent = torch.tensor([-status.done, status.faulty, status.notice])
        if self.group is not None:
            self._work = dist.all_reduce(
                self._sent, dist.ReduceOp.MAX, group=self.group, async_op=True
            )
        return RankStatus(-done, faulty, notice)


@dataclass
class _Upload:
    """Upload of this rank's shard. `number` counts the checkpoints since this start, from 1."""

    number: int
    step: int
    folder: str
    manifest: Manifest = field(default_factory=dict)
    fault: str | None = None
    thread: threading.Thread | None = None

    @property
    def uploading(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class CheckpointWriter:
    """Writes a run's checkpoints. Every rank has one; all call its methods equally often.

    `on_event` receives, on rank 0, a sentence about a checkpoint that could not be written;
    training continues and tries again at the next one. `on_complete` receives, on rank 0, the step
    and the folder of each complete checkpoint. `start` is the id of this start, `timeout` in
    seconds; `minutes` after the last checkpoint another one is due.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        start: str,
        keep_last: int,
        keep_every: int | None,
        on_event: Callable[[str], None],
        on_complete: Callable[[int, str], None] = lambda step, folder: None,
        timeout: float = 1800,
        minutes: float = math.inf,
    ):
        self._checkpoints, self._start, self._keep, self._on_event, self._on_complete = (
            checkpoints,
            start,
            (keep_last, keep_every),
            on_event,
            on_complete,
        )
        self._status_reduce = StatusReduce(timeout)
        self._upload: _Upload | None = None
        self._number = 0
        self._commit_thread: threading.Thread | None = None
        self._last_complete_step = 0  # set on rank 0 only
        self._minutes, self._saved, self._asked = minutes, time.monotonic(), False

    def save(
        self, step: int, write: Callable[[Path], None], beat: Callable[[], None] = lambda: None
    ) -> None:
        """Start a checkpoint: `write` saves this rank's files to a folder, a thread uploads them.

        Waits for the upload of the previous checkpoint first, with a `beat` after every exchange
        between the ranks, and returns once `write` has returned.
        """
        began, previous = time.monotonic(), self._upload
        self._wait_for_upload(beat)
        waited = time.monotonic() - began
        if previous is not None and waited > WAIT_SECONDS and self._status_reduce.rank == 0:
            self._on_event(
                f"training waited {waited:.0f} s for the upload of the checkpoint of step "
                f"{previous.step:,}"
            )
        self._saved, self._asked = time.monotonic(), False
        self._number += 1
        upload = _Upload(self._number, step, self._checkpoints.folder(step, self._start))
        remote = storage.is_remote(upload.folder)
        staged = Path(tempfile.mkdtemp(prefix="glide-")) if remote else Path(upload.folder)
        try:
            staged.mkdir(parents=True, exist_ok=True)
            files = _write_files(staged, write)
        except (OSError, SafetensorError, storage.StorageError) as error:
            upload.fault = _error_sentence(error)
            if remote:
                shutil.rmtree(staged, ignore_errors=True)
        else:
            upload.thread = threading.Thread(
                target=self._upload_files,
                args=(upload, files, staged if remote else None),
                name="glide-upload",
                daemon=True,
            )
            upload.thread.start()
        self._upload = upload

    def step(self, notice: int = NONE) -> int:
        """Call after every optimizer step, with this rank's notice.

        Returns the highest notice of any rank, as of the previous call.
        """
        if self._is_due():
            notice, self._asked = max(notice, SAVE), True
        upload = self._upload
        done = self._number if upload is None or not upload.uploading else self._number - 1
        faulty = upload.number if upload is not None and upload.fault is not None else 0
        reduced = self._status_reduce.exchange(RankStatus(done, faulty, notice))
        if upload is not None and reduced.done >= upload.number:
            self._upload = None
            self._complete_or_discard(upload, reduced.faulty == upload.number)
        return reduced.notice

    def _is_due(self) -> bool:
        """Whether this rank asks for a checkpoint now. Rank 0 alone watches the time."""
        waited = time.monotonic() - self._saved
        return self._status_reduce.rank == 0 and not self._asked and waited > 60 * self._minutes

    def finish(self, beat: Callable[[], None] = lambda: None) -> int:
        """Wait until the last checkpoint is complete or has failed.

        Calls `beat` after every exchange between the ranks, as a sign of life during a long
        upload. Returns the step of the last complete checkpoint, on every rank.
        """
        self._wait_for_upload(beat)
        if self._commit_thread is not None:
            self._commit_thread.join()
        return broadcast_object(self._last_complete_step, self._status_reduce.group)

    # -- collective --------------------------------------------------------------------------------

    def _wait_for_upload(self, beat: Callable[[], None] = lambda: None) -> None:
        while self._upload is not None:
            self.step()
            beat()
            if self._upload is not None and self._upload.uploading:
                time.sleep(0.01)

    def _complete_or_discard(self, upload: _Upload, faulty: bool) -> None:
        """Complete the checkpoint, or discard it if a rank could not write its shard."""
        shards = all_gather_object((upload.manifest, upload.fault), self._status_reduce.group)
        if self._status_reduce.rank:
            return
        if self._commit_thread is not None:
            self._commit_thread.join()
        if faulty:
            fault = next(filter(None, (fault for _, fault in shards)))
            self._on_event(
                f"The checkpoint of step {upload.step:,} could not be written: {fault} {CONTINUES}"
            )
            work = partial(self._discard, upload.folder)
        else:
            work = partial(
                self._complete,
                upload,
                {name: entry for manifest, _ in shards for name, entry in manifest.items()},
            )
        self._commit_thread = threading.Thread(target=work, name="glide-commit", daemon=True)
        self._commit_thread.start()

    # -- background threads ------------------------------------------------------------------------

    def _upload_files(self, upload: _Upload, files: list[Path], staged: Path | None) -> None:
        try:
            for file in files:
                sha256 = storage.digest(file)
                if staged is not None:
                    storage.put(file, f"{upload.folder}/{file.name}", sha256)
                upload.manifest[file.name] = (file.stat().st_size, sha256)
        except (OSError, storage.StorageError) as error:
            upload.fault = _error_sentence(error)
        finally:
            if staged is not None:
                shutil.rmtree(staged, ignore_errors=True)

    def _complete(self, upload: _Upload, manifest: Manifest) -> None:
        try:
            self._checkpoints.complete(upload.folder, manifest)
            self._last_complete_step = upload.step
            self._on_complete(upload.step, upload.folder)
            self._checkpoints.retire(*self._keep, self._start)
        except storage.StorageError as error:
            self._on_event(
                f"The checkpoint of step {upload.step:,} could not be completed: {error} "
                f"{CONTINUES}"
            )

    def _discard(self, folder: str) -> None:
        with suppress(storage.StorageError):  # the next start of the run removes it
            storage.remove_folder(folder)


def _write_files(folder: Path, write: Callable[[Path], None]) -> list[Path]:
    """Run `write` and return its files, moved to a folder that other ranks may write to as well."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        write(Path(temporary))
        return [file.rename(folder / file.name) for file in sorted(Path(temporary).iterdir())]


def _error_sentence(error: Exception) -> str:
    return (
        f"{error.strerror} ({error.filename})."
        if isinstance(error, OSError) and error.strerror
        else f"{str(error).rstrip('.')}."
    )
