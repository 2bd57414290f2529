"""Checkpoints written during training: each rank uploads its shard in a background thread.

A checkpoint is complete once all shards have been uploaded. The ranks find out through one small
all-reduce per step, whose result is read one step later, so that no rank waits for it.
"""

from __future__ import annotations

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
from .checkpoint import Checkpoints, Receipt
from .collectives import all_gather_object, broadcast_object

GOES_ON = "Training continues, and the next checkpoint is tried."


class RankStatus(NamedTuple):
    """A rank's status after a step.

    `done`: number of the last checkpoint whose upload has ended, successfully or not; `faulty`:
    number of the last checkpoint that could not be written; `notice`: 1 if the rank's node is
    about to be preempted. Checkpoints are numbered from 1 since the launch.
    """

    done: int = 0
    faulty: int = 0
    notice: int = 0


class StatusReduce:
    """Asynchronous all-reduce of the rank statuses, over gloo beside the devices' collectives.

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
    """Upload of this rank's shard. `number` counts the checkpoints since the launch, from 1."""

    number: int
    step: int
    folder: str
    receipt: Receipt = field(default_factory=dict)
    fault: str | None = None
    thread: threading.Thread | None = None

    @property
    def on_its_way(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class CheckpointWriter:
    """Writes a run's checkpoints. Every rank has one; all call its methods equally often.

    `on_event` receives, on rank 0, a sentence about a checkpoint that could not be written;
    training continues and tries again at the next one. `committed` receives, on rank 0, the step
    and the folder of each complete checkpoint. `start` is the id of the launch, `timeout` in
    seconds.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        start: str,
        keep_last: int,
        keep_every: int | None,
        on_event: Callable[[str], None],
        committed: Callable[[int, str], None] = lambda step, folder: None,
        timeout: float = 1800,
    ):
        self._checkpoints, self._start, self._keep, self._on_event, self._committed = (
            checkpoints,
            start,
            (keep_last, keep_every),
            on_event,
            committed,
        )
        self._agreement = StatusReduce(timeout)
        self._upload: _Upload | None = None
        self._number = 0
        self._commit: threading.Thread | None = None
        self._whole = 0  # step of the last complete checkpoint; set on rank 0 only

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Start a checkpoint: `write` saves this rank's files to a folder, a thread uploads them.

        Waits for the previous checkpoint first, and returns once `write` has returned.
        """
        self._settle()
        self._number += 1
        upload = _Upload(self._number, step, self._checkpoints.folder(step, self._start))
        remote = storage.is_remote(upload.folder)
        staged = Path(tempfile.mkdtemp(prefix="glide-")) if remote else Path(upload.folder)
        try:
            staged.mkdir(parents=True, exist_ok=True)
            files = _written(staged, write)
        except (OSError, SafetensorError, storage.StorageError) as error:
            upload.fault = _why(error)
            if remote:
                shutil.rmtree(staged, ignore_errors=True)
        else:
            upload.thread = threading.Thread(
                target=self._send,
                args=(upload, files, staged if remote else None),
                name="glide-upload",
                daemon=True,
            )
            upload.thread.start()
        self._upload = upload

    def step(self, notice: bool = False) -> bool:
        """Call after every optimizer step. `notice`: this rank's node is about to be preempted.

        Returns whether the node of any rank is about to be preempted, as of the previous call.
        """
        upload = self._upload
        done = self._number if upload is None or not upload.on_its_way else self._number - 1
        faulty = upload.number if upload is not None and upload.fault is not None else 0
        heard = self._agreement.exchange(RankStatus(done, faulty, int(notice)))
        if upload is not None and heard.done >= upload.number:
            self._upload = None
            self._close(upload, heard.faulty == upload.number)
        return bool(heard.notice)

    def finish(self, beat: Callable[[], None] = lambda: None) -> int:
        """Wait until the last checkpoint is complete or has failed.

        Calls `beat` after every exchange between the ranks, as a sign of life during a long
        upload. Returns the step of the last complete checkpoint, on every rank.
        """
        self._settle(beat)
        if self._commit is not None:
            self._commit.join()
        return broadcast_object(self._whole, self._agreement.group)

    # -- collective --------------------------------------------------------------------------------

    def _settle(self, beat: Callable[[], None] = lambda: None) -> None:
        while self._upload is not None:
            self.step()
            beat()
            if self._upload is not None and self._upload.on_its_way:
                time.sleep(0.01)

    def _close(self, upload: _Upload, faulty: bool) -> None:
        """Complete the checkpoint, or discard it if a rank could not write its shard."""
        told = all_gather_object((upload.receipt, upload.fault), self._agreement.group)
        if self._agreement.rank:
            return
        if self._commit is not None:
            self._commit.join()
        if faulty:
            fault = next(filter(None, (fault for _, fault in told)))
            self._on_event(
                f"The checkpoint of step {upload.step:,} could not be written: {fault} {GOES_ON}"
            )
            work = partial(self._discard, upload.folder)
        else:
            work = partial(
                self._complete,
                upload,
                {name: entry for receipt, _ in told for name, entry in receipt.items()},
            )
        self._commit = threading.Thread(target=work, name="glide-commit", daemon=True)
        self._commit.start()

    # -- background threads ------------------------------------------------------------------------

    def _send(self, upload: _Upload, files: list[Path], staged: Path | None) -> None:
        try:
            for file in files:
                sha256 = storage.digest(file)
                if staged is not None:
                    storage.put(file, f"{upload.folder}/{file.name}", sha256)
                upload.receipt[file.name] = (file.stat().st_size, sha256)
        except (OSError, storage.StorageError) as error:
            upload.fault = _why(error)
        finally:
            if staged is not None:
                shutil.rmtree(staged, ignore_errors=True)

    def _complete(self, upload: _Upload, receipt: Receipt) -> None:
        try:
            self._checkpoints.complete(upload.folder, receipt)
            self._whole = upload.step
            self._committed(upload.step, upload.folder)
            self._checkpoints.retire(*self._keep, self._start)
        except storage.StorageError as error:
            self._on_event(
                f"The checkpoint of step {upload.step:,} could not be completed: {error} {GOES_ON}"
            )

    def _discard(self, folder: str) -> None:
        with suppress(storage.StorageError):  # the next launch of the run removes it
            storage.remove_folder(folder)


def _written(folder: Path, write: Callable[[Path], None]) -> list[Path]:
    """Run `write` and return its files, moved to a folder that other ranks may write to as well."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as own:
        write(Path(own))
        return [file.rename(folder / file.name) for file in sorted(Path(own).iterdir())]


def _why(error: Exception) -> str:
    return (
        f"{error.strerror} ({error.filename})."
        if isinstance(error, OSError) and error.strerror
        else f"{str(error).rstrip('.')}."
    )
