"""Checkpoints while training goes on: each rank uploads its part in a thread, and the whole counts once every part is there.

Ranks agree by one small all-reduce a step, whose answer is looked at a step later: nobody waits for it.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from .. import storage
from .checkpoint import Checkpoints, Receipt

DONE, FAULTY, NOTICE = range(3)


class Agreement:
    """The largest of what any rank, and the smallest of what every rank has last said, on the CPU beside the devices' collectives."""

    def __init__(self, timeout: float):
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if self.world > 1 else None
        self._said, self._work = torch.zeros(3, dtype=torch.int64), None

    def exchange(self, said: tuple[int, int, int]) -> tuple[int, int, int]:
        """Say (done, faulty, notice), and hear what all said at the last exchange: done is the least of theirs, the others the greatest."""
        if self._work is not None:
            self._work.wait()
        heard = tuple(self._said.tolist())
        self._said = torch.tensor([-said[DONE], said[FAULTY], said[NOTICE]])
        if self._group is not None:
            self._work = dist.all_reduce(self._said, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return -heard[DONE], heard[FAULTY], heard[NOTICE]

    def gather(self, given: Receipt) -> list[Receipt]:
        """What each rank gives, on all of them."""
        if self._group is None:
            return [given]
        gathered: list = [None] * self.world
        dist.all_gather_object(gathered, given, group=self._group)
        return gathered


@dataclass
class _Upload:
    """This rank's part of a checkpoint on its way. `number` counts the run's checkpoints since its start, from 1."""

    number: int
    step: int
    folder: str
    receipt: Receipt = field(default_factory=dict)
    fault: str | None = None
    thread: threading.Thread | None = None

    @property
    def on_its_way(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Keeper:
    """Makes a run's checkpoints. All ranks make one of each, and call its methods equally often.

    `say` is told in a sentence what could not be written: the run goes on, and the next checkpoint is another try.
    `committed` is told, on rank 0, of each checkpoint that is whole.
    """

    def __init__(self, checkpoints: Checkpoints, start: str, keep_last: int, keep_every: int | None, say: Callable[[str], None],
                 committed: Callable[[int, str], None] = lambda step, folder: None, timeout: float = 1800):
        self._checkpoints, self._start, self._keep, self._say, self._committed = checkpoints, start, (keep_last, keep_every), say, committed
        self._agreement = Agreement(timeout)
        self._upload: _Upload | None = None
        self._number = 0
        self._commit: threading.Thread | None = None
        self.last_step, self.fault = 0, None        # of the last checkpoint that all ranks have written; why the one after it was not

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Begin a checkpoint: `write` puts this rank's files into a folder, then training may go on. Waits for the one before it."""
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
            upload.thread = threading.Thread(target=self._send, args=(upload, files, staged if remote else None), name="glide-upload", daemon=True)
            upload.thread.start()
        self._upload = upload

    def step(self, notice: bool = False) -> bool:
        """After every optimizer step. `notice`: this rank's node is about to be taken away. Returns whether any rank's is."""
        return self._advance(notice)

    def finish(self) -> int:
        """Wait until the last checkpoint is whole or given up. Returns the step of the last that all ranks have written."""
        self._settle()
        if self._commit is not None:
            self._commit.join()
        return self.last_step

    # -- what all ranks agree on --------------------------------------------------------------------------------------

    def _advance(self, notice: bool = False) -> bool:
        upload = self._upload
        done = self._number if upload is None or not upload.on_its_way else self._number - 1
        faulty = upload.number if upload is not None and upload.fault is not None else 0
        all_done, any_faulty, any_notice = self._agreement.exchange((done, faulty, int(notice)))
        if upload is not None and all_done >= upload.number:
            self._upload = None
            self._close(upload, any_faulty == upload.number)
        return bool(any_notice)

    def _settle(self) -> None:
        while self._upload is not None:
            self._advance()
            if self._upload is not None and self._upload.on_its_way:
                time.sleep(0.01)

    def _close(self, upload: _Upload, faulty: bool) -> None:
        """All parts are there, or one could not be written."""
        receipts = self._agreement.gather({**upload.receipt, "": (0, upload.fault)} if upload.fault else upload.receipt)
        if self._commit is not None:
            self._commit.join()
        if faulty:
            faults = [receipt[""][1] for receipt in receipts if "" in receipt]
            self.fault = faults[0] if faults else "a part is lacking"
        else:
            self.last_step, self.fault = upload.step, None
        if self._agreement.rank:
            return
        if faulty:
            self._say(f"The checkpoint of step {upload.step:,} could not be written: {self.fault} Training goes on; the next one is another try.")
            work = (self._discard, upload.folder)
        else:
            work = (self._complete, upload, {name: entry for receipt in receipts for name, entry in receipt.items()})
        self._commit = threading.Thread(target=work[0], args=work[1:], name="glide-commit", daemon=True)
        self._commit.start()

    # -- in threads ---------------------------------------------------------------------------------------------------

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
            self._committed(upload.step, upload.folder)
            self._checkpoints.retire(*self._keep)
        except storage.StorageError as error:
            self._say(f"The checkpoint of step {upload.step:,} could not be completed: {error} Training goes on; the next one is another try.")

    def _discard(self, folder: str) -> None:
        try:
            storage.remove_folder(folder)
        except storage.StorageError:        # swept up when the run is begun again
            pass


def _written(folder: Path, write: Callable[[Path], None]) -> list[Path]:
    """The files that `write` adds to a folder that other ranks may write to as well."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as own:
        write(Path(own))
        return [file.rename(folder / file.name) for file in sorted(Path(own).iterdir())]


def _why(error: Exception) -> str:
    return f"{error.strerror} ({error.filename})." if isinstance(error, OSError) and error.strerror else f"{str(error).rstrip('.')}."
