"""A writer of checkpoints whose messages and commits a test can read."""

from glide_ray.train.checkpoint import Checkpoints
from glide_ray.train.checkpoint_writer import CheckpointWriter


def keeper(place, keep_last=2, keep_every=None, start="start", **others):
    events, committed = [], []
    writer = CheckpointWriter(
        Checkpoints(place),
        start,
        keep_last,
        keep_every,
        events.append,
        lambda step, folder: committed.append(step),
        **others,
    )
    return writer, events, committed


def write(content):
    def into(folder):
        (folder / "part.0.safetensors").write_bytes(content)
        (folder / "progress.json").write_text("{}")

    return into
