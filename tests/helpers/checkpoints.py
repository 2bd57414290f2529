"""A writer of checkpoints whose messages and commits a test can read."""

from glide_ray.train.checkpoint import Checkpoints
from glide_ray.train.checkpoint_writer import CheckpointWriter


def keeper(place, keep_last=2, keep_every=None, **others):
    told, committed = [], []
    made = CheckpointWriter(
        Checkpoints(place),
        "start",
        keep_last,
        keep_every,
        told.append,
        lambda step, folder: committed.append(step),
        **others,
    )
    return made, told, committed


def write(content):
    def into(folder):
        (folder / "part.0.safetensors").write_bytes(content)
        (folder / "progress.json").write_text("{}")

    return into
