"""First stage of `glide clean`: judge the rows of each part, in a file per part.

A file is written whole or not at all. It is used again by a run that resumes, unless the part has
changed since, or could not be read to its end.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.parquet
import ray

from ... import storage
from ...config.data import CleanConfig
from ...data.baselines import (
    baseline_caption_rules,
    baseline_image_rules,
    needs_features,
    needs_scores,
)
from ...data.duplicates import FINGERPRINT_BYTES, fingerprint, hash_of, sketch_of
from ...data.filters import (
    Candidate,
    Report,
    Rule,
    caption_rules,
    clean_captions,
    exact_reason,
    first_broken,
    image_rules,
)
from ...data.sources import Part, named_by_path, read_part
from ...errors import UserError
from ...progress import bar
from .features import PartFeatures, limit_threads, run_with_network, save_features
from .tasks import TRIES, run_each

if TYPE_CHECKING:  # PyTorch takes a worker 2 s to import; only those with a network do
    from ...evaluation.picture_features import PictureFeatures

log = logging.getLogger(__name__)

# The row of position n is the n-th of the table. The columns after `height` are null in dropped
# rows: the hash, sketch and whole of the fingerprint (see data/duplicates.py), and a hash of it.
# `score` is the CLIP score, if there is one (see data/baselines.py).
SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.large_string()),
        ("reason", pyarrow.large_string()),
        ("caption", pyarrow.large_string()),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        ("hash", pyarrow.uint64()),
        ("sketch", pyarrow.uint64()),
        ("digest", pyarrow.uint64()),
        ("fingerprint", pyarrow.binary(FINGERPRINT_BYTES)),
        ("score", pyarrow.float32()),
    ]
)
STATES_AT_ONCE = 16  # requests for the states of images that a Parquet file names by path
RESULT = b"glide_ray"  # key of a `PartResult` in the metadata of a file


@dataclass
class PartResult:
    """Counts of one part, before near-duplicates are dropped."""

    number: int
    state: str  # of the part's file, see `state_of`
    read: int = 0
    kept: int = 0
    captions_dropped: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    done_before: bool = False  # by the run that this one resumes


class Judged:
    """Counts of all parts: some bytes per part, and a report in the order of the parts."""

    def __init__(self, parts: int):
        self.read, self.kept = np.zeros(parts, np.int64), np.zeros(parts, np.int64)
        self.captions_dropped = 0
        self.dropped: dict[str, int] = {}
        self._examples: dict[str, tuple[int, int, str]] = {}
        self._faults: list[tuple[int, str]] = []
        self._states = np.zeros((parts, 8), np.uint8)

    def add(self, result: PartResult) -> None:
        number = result.number
        self.read[number], self.kept[number] = result.read, result.kept
        self.captions_dropped += result.captions_dropped
        for place, (reason, count) in enumerate(result.dropped.items()):
            self.dropped[reason] = self.dropped.get(reason, 0) + count
            self._set_example(reason, (number, place, result.examples[reason]))
        self._faults += [(number, fault) for fault in result.faults]
        state = json.dumps([result.state, result.read, result.kept, result.faults]).encode()
        self._states[number] = np.frombuffer(hashlib.sha256(state).digest()[:8], np.uint8)

    def _set_example(self, reason: str, example: tuple[int, int, str]) -> None:
        """Keep the example of the first part: (part, place among its reasons, key of the row)."""
        self._examples[reason] = min(self._examples.get(reason, example), example)

    def drop_copies(
        self,
        reason: str,
        parts: Sequence[int],
        counts: Sequence[int],
        example: tuple[int, str] | None,
    ) -> None:
        """Count duplicates by part, with (part, key) of the first one."""
        if example is not None:
            self.kept[parts] -= counts
            self.dropped[reason] = self.dropped.get(reason, 0) + sum(counts)
            part, key = example
            self._set_example(reason, (part, len(self.dropped), key))

    @property
    def digest(self) -> str:
        """Hash of what was read; later stages depend on it."""
        return hashlib.sha256(self._states.tobytes()).hexdigest()[:16]

    def report(self, faults: Sequence[str] = ()) -> Report:
        report = Report(int(self.kept.sum()), faults=[*(f for _, f in sorted(self._faults))])
        report.faults += faults
        for reason, (*_, key) in sorted(self._examples.items(), key=lambda pair: pair[1]):
            report.dropped[reason], report.examples[reason] = self.dropped[reason], key
        return report


def judge(
    parts: Sequence[Part], folder: str, config: CleanConfig, rules: Mapping[str, Rule]
) -> Judged:
    """Judge each row independently of the others, into `judged_file`s of `folder`."""
    settings, judged, resumed = (config, dict(rules)), Judged(len(parts)), 0
    results: Iterator[PartResult]
    if needs_features(config) or needs_scores(config):
        arguments = ((number, part, folder) for number, part in enumerate(parts))
        results = run_with_network(NetworkJudge, settings, parts, arguments, died)
    else:
        shared = ray.put(settings)
        with_rules = ((number, part, folder, shared) for number, part in enumerate(parts))
        results = run_each(_judge_part, with_rules, died)
    with bar("clean", "part", len(parts)) as progress:
        for result in results:
            judged.add(result)
            resumed += result.done_before
            progress.update(1)
    if resumed:
        log.info(f"{resumed:,} of {len(parts):,} parts were judged before the interruption")
    return judged


def judged_file(folder: str, number: int) -> str:
    return f"{folder}/judged/{number:06d}.parquet"


def state_of(part: Part) -> str:
    """A string that changes when the file of a part changes; "" for one that cannot be read.

    For images of a folder: when one of the files, or a text beside it, changes; in S3, by the ETags
    of the listing. For images that a Parquet file names by path: when the file or an image changes.
    The state of a shard in S3 begins with its ETag.
    """
    if not part.files:
        try:
            if not (state := storage.state(part.url)):
                return ""
            with ThreadPoolExecutor(STATES_AT_ONCE) as pool:
                named = list(pool.map(storage.state, named_by_path(part)))
        except storage.StorageError:  # `read_part` says why
            return ""
        return f"{state} {hashlib.sha256(repr(named).encode()).hexdigest()}" if named else state
    if storage.is_remote(part.files[0].path):
        return hashlib.sha256(repr([part.files, part.etags]).encode()).hexdigest()
    found = [
        list(storage.list_states(name, ("",)))
        for image in part.files
        for name in (image.path, *image.texts)
    ]
    return hashlib.sha256(repr([part.files, found]).encode()).hexdigest()


def etags_of(part: Part, state: str) -> Sequence[str]:
    """ETags that the objects of a part with this `state` must have; none for local files."""
    if part.files:
        return part.etags
    return state.split(" ")[:1] if state and storage.is_remote(part.url) else ()


def died(arguments: tuple[Any, ...]) -> PartResult:
    """The result of a part that kills its worker: a fault. `arguments`: number, part, folder."""
    number, part, folder, *_ = arguments
    fault = f"{part.url} killed its worker {TRIES} times and was left out."
    result = PartResult(number, "", faults=[fault])
    write_judged([], result, folder)
    return result


class NetworkJudge:
    """Judges parts with a network that it loads once, as an actor or in this process."""

    def __init__(self, config: CleanConfig, rules: Mapping[str, Rule]):
        from ...evaluation.picture_features import PictureFeatures

        limit_threads()
        self._settings, self._network = (config, rules), PictureFeatures(config.clip)

    def judge(self, number: int, part: Part, folder: str) -> PartResult:
        return _judge_part(number, part, folder, self._settings, self._network)


def _judge_part(
    number: int,
    part: Part,
    folder: str,
    settings: tuple[CleanConfig, Mapping[str, Rule]],
    network: PictureFeatures | None = None,
) -> PartResult:
    state = state_of(part)
    earlier = read_result(folder, number)
    if earlier is not None and earlier.state == state and state and not earlier.faults:
        return replace(earlier, done_before=True)
    result = PartResult(number, state)
    config, rules = settings
    features = PartFeatures(network, needs_scores(config)) if network else None
    rows = list(_judged_rows(part, config, rules, result, features))
    if features is not None:
        # First: a judged file of a part means that its features are there.
        positions, found = features.finish()
        if needs_features(config):
            save_features(folder, number, positions, found)
    write_judged(rows, result, folder)
    return result


def _judged_rows(
    part: Part,
    config: CleanConfig,
    rules: Mapping[str, Rule],
    result: PartResult,
    features: PartFeatures | None = None,
) -> Iterator[dict[str, Any]]:
    rules_of_images = {**image_rules(config), **baseline_image_rules(config)}
    rules_of_captions, of_baseline = caption_rules(config), baseline_caption_rules(config)
    try:
        for position, sample in enumerate(read_part(part, etags_of(part, result.state))):
            candidate = Candidate(sample)
            captions, reason = clean_captions(sample.captions, rules_of_captions)
            reason = (
                first_broken(candidate, rules_of_images)
                or (reason and exact_reason(sample, reason))
                or _first_broken_user_rule(candidate, rules)
            )
            row: dict[str, Any] = {"key": sample.key}
            if reason is None:
                if features is not None:
                    features.add(position, row, candidate.picture, captions)
                captions, reason = clean_captions(captions, of_baseline)
            result.captions_dropped += sample.captions_unread + len(sample.captions) - len(captions)
            row |= {"reason": reason or "", "caption": captions[0] if captions else ""}
            if reason is None:
                width, height = candidate.picture.size
                row |= {"width": width, "height": height}
                row |= {"fingerprint": fingerprint(candidate.picture)}
            yield row
    except UserError as error:
        result.faults.append(str(error))


def _first_broken_user_rule(candidate: Candidate, rules: Mapping[str, Rule]) -> str | None:
    for name, rule in rules.items():
        try:
            if not rule(candidate):
                return name
        except Exception as error:
            # A rule that raises has not approved the row: drop the row and continue.
            return f"on which {name.removeprefix('against ')} raised {type(error).__name__}"
    return None


def write_judged(rows: Sequence[dict[str, Any]], result: PartResult, folder: str) -> None:
    """Count rows in `result` and write them, with the fields of SCHEMA before `hash`."""
    for row in rows:
        count_row(result, row["key"], row["reason"])
    columns = {
        name: pyarrow.array([row.get(name) for row in rows], SCHEMA.field(name).type)
        for name in SCHEMA.names
    }
    prints = [row["fingerprint"] for row in rows if row.get("fingerprint")]
    if prints:
        columns |= fingerprint_columns(rows, prints)
    save_judged(pyarrow.table(columns, SCHEMA), result, folder)


def fingerprint_columns(
    rows: Sequence[Mapping[str, Any]], prints: Sequence[bytes]
) -> dict[str, pyarrow.Array]:
    """The columns `hash`, `sketch` and `digest`, null in rows without a fingerprint."""
    matrix = np.frombuffer(b"".join(prints), np.uint8).reshape(len(prints), FINGERPRINT_BYTES)
    digests = [hashlib.blake2b(one, digest_size=8).digest() for one in prints]
    missing = np.array([not row.get("fingerprint") for row in rows])
    columns = {}
    for name, values in (
        ("hash", hash_of(matrix)),
        ("sketch", sketch_of(matrix)),
        ("digest", np.frombuffer(b"".join(digests), np.uint64)),
    ):
        whole = np.zeros(len(rows), np.uint64)
        whole[~missing] = values
        columns[name] = pyarrow.array(whole, mask=missing)
    return columns


def count_row(result: PartResult, key: str, reason: str) -> None:
    result.read += 1
    if reason:
        result.dropped[reason] = result.dropped.get(reason, 0) + 1
        result.examples.setdefault(reason, key)
    else:
        result.kept += 1


def save_judged(table: pyarrow.Table, result: PartResult, folder: str) -> None:
    about = {RESULT: json.dumps(asdict(result)).encode()}
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table.replace_schema_metadata(about), sink)
    storage.put(sink.getvalue().to_pybytes(), judged_file(folder, result.number))


def read_result(folder: str, number: int) -> PartResult | None:
    """The counts in a judged file, or None if there is no whole one."""
    try:
        with storage.open_ranges(judged_file(folder, number)) as file:
            schema = pyarrow.parquet.read_schema(file)
        return PartResult(**json.loads(schema.metadata[RESULT]))
    except (storage.MissingError, pyarrow.ArrowInvalid, KeyError, TypeError):
        return None
