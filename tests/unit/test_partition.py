"""Checkpoints: written by one layout of ranks and ZeRO stage, resumed by any other.

Nothing is unpickled, and exporting needs little memory.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import tiny
from helpers.training import batch, epochs, preset, run
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed as dist

from glide_ray import storage
from glide_ray.errors import UserError
from glide_ray.models.weights import load_model
from glide_ray.train import deepspeed_engine, partition
from glide_ray.train.checkpoint import COMPLETE, CheckpointError, Checkpoints, TrainingPosition


def losses(metrics):
    return [row["loss"] for row in metrics if "loss" in row]


def contents(folder):
    with partition.CheckpointReader(folder) as parts:
        return {
            (kind, name): parts.full(kind, name) for kind in parts.kinds for name in parts.shapes
        }


@pytest.mark.parametrize("before, after", [(0, 3), (3, 1), (1, 2), (2, 0)])
def test_a_run_goes_on_with_another_zero_stage_as_if_it_had_not_stopped(tmp_path, before, after):
    from glide_ray.train.loop import Trainer

    whole, saved, _ = run(Trainer(preset(f"zero_stage={before}")), tmp_path)
    later = Trainer(preset(f"zero_stage={after}"))
    later.load(saved[0])
    rest, _, _ = run(later)
    assert losses(rest) == pytest.approx(losses(whole)[2:], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_bf16_network_computes_with_what_was_loaded(tmp_path, stage):
    from glide_ray.train.loop import Trainer

    whole, saved, _ = run(Trainer(preset("precision=bf16", f"zero_stage={stage}")), tmp_path)
    # Another seed, hence other initial weights.
    later = Trainer(preset("precision=bf16", f"zero_stage={stage}", "seed=5"))
    later.load(saved[1])
    assert later.held_out([batch(999)])["held_out"] != pytest.approx(whole[0]["held_out"], rel=1e-3)
    assert later.progress.step == 4
    later.preset = preset("precision=bf16", f"zero_stage={stage}")
    rest, _, _ = run(later)
    assert losses(rest) == losses(whole)[4:]


def test_adam_step_count_is_on_the_parameters_device_before_the_first_step():
    """The meta device stands in for a GPU."""
    master = torch.zeros(5, device="meta", requires_grad=True)
    adam = torch.optim.AdamW([master], fused=True)
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(single_partition_of_fp32_groups=[master], optimizer=adam)
    )
    deepspeed_engine.moments(engine)
    deepspeed_engine.set_adam_steps(engine, 7)
    assert {
        name: (value.device.type, value.dtype, value.shape)
        for name, value in adam.state[master].items()
    } == {
        "step": ("meta", torch.float32, ()),
        "exp_avg": ("meta", torch.float32, (5,)),
        "exp_avg_sq": ("meta", torch.float32, (5,)),
    }


# -- two ranks -------------------------------------------------------------------------------------


def rank_of_two(rank, folder, stage, start, more):
    """One of two ranks: train from scratch or from checkpoint `start`, and save.

    Writes its metrics and the number of elements that it holds of each kind to `rank.N.json`.
    """
    from pathlib import Path

    from glide_ray.train.loop import Trainer
    from glide_ray.train.steps import TrainCallbacks, train_loop

    trainer = Trainer(preset("workers=2", f"zero_stage={stage}", *more))
    if start:
        trainer.load(Path(start))
    folder, metrics = Path(folder), []

    def halves(epoch, rows):
        return (given[2 * rank : 2 * rank + 2] for given in epochs(epoch, rows))

    def checkpoint(write):
        target = folder / str(trainer.progress.step)
        target.mkdir(exist_ok=True)
        write(target)
        dist.barrier()

    train_loop(
        trainer,
        halves,
        [batch(999)[2 * rank : 2 * rank + 2]],
        TrainCallbacks(metrics.append, checkpoint),
    )
    numbers = {
        "parameters": sum(
            getattr(p, "ds_tensor", p).numel() for p in trainer.engine.module.parameters()
        ),
        "masters": sum(t.numel() for t in trainer.ema.masters),
        "average": sum(t.numel() for t in trainer.ema.averages["0.9"]),
        "moments": sum(t.numel() for t in deepspeed_engine.moments(trainer.engine)["exp_avg"]),
    }
    if stage == 3:
        numbers["gradients"] = trainer.engine.optimizer.grad_partitions_flat_buffer.numel()
    (folder / f"rank.{rank}.json").write_text(json.dumps({"metrics": metrics, "numbers": numbers}))
    checkpoint(trainer.save)


def train_on(two_ranks, folder, stage, start=None, more=()):
    folder.mkdir(parents=True, exist_ok=True)
    two_ranks.run(rank_of_two, str(folder), stage, None if start is None else str(start), more)
    return [json.loads((folder / f"rank.{rank}.json").read_text()) for rank in range(2)]


TWENTY = ("steps=20", "evaluate_every=50", "checkpoint_every=4", "ema_rates=0.9,0.5")


@pytest.fixture(scope="module")
def alone():
    from glide_ray.train.loop import Trainer

    return losses(run(Trainer(preset("zero_stage=1", *TWENTY)))[0])


@pytest.fixture(scope="module")
def under_stage_3(tmp_path_factory, two_ranks):
    """A run of 20 steps on two ranks under ZeRO stage 3: (folder, contents of `rank.N.json`)."""
    folder = tmp_path_factory.mktemp("stage3")
    return folder, train_on(two_ranks, folder, 3, more=TWENTY)


def test_what_two_ranks_wrote_under_stage_3_one_rank_takes_up_and_the_reverse_to_the_last_bit(
    tmp_path, under_stage_3, alone, two_ranks
):
    from glide_ray.train.loop import Trainer

    folder, _ = under_stage_3
    one = Trainer(preset("zero_stage=1", *TWENTY))
    one.load(folder / "4")
    assert one.progress == TrainingPosition(step=4, epoch=1, rows=4)
    (tmp_path / "one").mkdir()
    one.save(tmp_path / "one")
    there, here = contents(folder / "4"), contents(tmp_path / "one")
    assert set(there) == set(here) and {kind for kind, _ in there} == {
        "weights",
        "exp_avg",
        "exp_avg_sq",
        "average/0.9",
        "average/0.5",
    }
    assert all(torch.equal(there[key], here[key]) for key in there)
    again = train_on(two_ranks, tmp_path / "back", 2, start=tmp_path / "one", more=TWENTY)
    assert losses(again[0]["metrics"]) == pytest.approx(alone[4:], rel=1e-4)


def test_two_workers_have_the_losses_of_one_in_20_steps(tmp_path, under_stage_3, alone, two_ranks):
    assert losses(under_stage_3[1][0]["metrics"]) == pytest.approx(alone, rel=1e-4)
    for stage in (0, 2):
        assert losses(
            train_on(two_ranks, tmp_path / str(stage), stage, more=TWENTY)[0]["metrics"]
        ) == pytest.approx(alone, rel=1e-4)


def test_under_stage_3_each_of_two_ranks_holds_half_of_everything(under_stage_3):
    from glide_ray.models.weights import build_model

    total = sum(p.numel() for p in build_model(tiny("base").model).parameters())
    for rank in under_stage_3[1]:
        assert set(rank["numbers"]) == {"parameters", "masters", "average", "moments", "gradients"}
        for kind, count in rank["numbers"].items():
            assert abs(count / (total / 2) - 1) < 0.05, (kind, count, total)


# -- files -----------------------------------------------------------------------------------------


def cut_into(folder, tensors, ranks):
    """Write a checkpoint's files as this number of ranks under ZeRO stage 3 would."""
    folder.mkdir(exist_ok=True)
    for rank in range(ranks):
        own, flat, offset = [], [], 0
        for name, tensor in tensors.items():
            length = -(-tensor.numel() // ranks)
            own_slice = tensor.flatten()[rank * length : (rank + 1) * length]
            if len(own_slice):
                own.append(
                    partition.ParamSlice(
                        name, tuple(tensor.shape), rank * length, len(own_slice), 0, offset
                    )
                )
                flat.append(own_slice)
                offset += len(own_slice)
        partition.save_part(
            partition.part_path(folder, rank),
            own,
            {"average/0.9": [torch.cat([torch.empty(0), *flat])]},
        )


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_an_export_is_the_file_that_safetensors_itself_would_write(tmp_path, ranks):
    torch.manual_seed(0)
    tensors = {"b.weight": torch.randn(3, 5, 2), "a": torch.randn(1), "c.bias": torch.randn(11)}
    cut_into(tmp_path, tensors, ranks)
    partition.export(tmp_path, "average/0.9", tmp_path / "out.safetensors", {"config": "{}"})
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"config": "{}"} and set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(CheckpointError, match="holds no average/0.5; it has average/0.9"):
        partition.export(tmp_path, "average/0.5", tmp_path / "other", {})
    assert not (tmp_path / "other").exists()


def test_an_export_wants_the_memory_of_the_largest_tensor_and_not_of_the_model(tmp_path):
    """384 MiB in 96 tensors from 2 ranks; the process grows by less than a sixth of that."""
    cut_into(tmp_path, {f"layer.{n}": torch.full((1024, 1024), float(n)) for n in range(96)}, 2)
    program = (
        "import resource, sys; from pathlib import Path; from glide_ray.train import partition\n"
        "import mmap\n"
        "def anonymous(): return int(next(l for l in open('/proc/self/status') "
        "if l.startswith('RssAnon')).split()[1])\n"
        "before = anonymous()\n"
        "peak = [0]\n"
        "full = partition.CheckpointReader.full\n"
        "def watched(self, *a):\n    made = full(self, *a); "
        "peak[0] = max(peak[0], anonymous()); return made\n"
        "partition.CheckpointReader.full = watched\n"
        "partition.export(Path(sys.argv[1]), 'average/0.9', sys.argv[1] + '/out.safetensors', {})\n"
        "print(peak[0] - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 64 * 2**20
    assert (tmp_path / "out.safetensors").stat().st_size > 96 * 2**22


def test_a_checkpoint_that_lacks_a_rank_or_is_damaged_is_refused(tmp_path):
    tensors = {"a": torch.randn(40), "b": torch.randn(7)}
    cut_into(tmp_path / "x", tensors, 3)
    partition.part_path(tmp_path / "x", 1).unlink()
    with (
        partition.CheckpointReader(tmp_path / "x") as parts,
        pytest.raises(CheckpointError, match="lacks the file of a rank: a is incomplete"),
    ):
        parts.full("average/0.9", "a")
    cut_into(tmp_path / "x", tensors, 3)
    path = partition.part_path(tmp_path / "x", 2)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="part.2.safetensors is damaged"):
        partition.CheckpointReader(tmp_path / "x")
    save_file({"x": torch.zeros(1)}, tmp_path / "part.0.safetensors")
    with pytest.raises(CheckpointError, match="part.0.safetensors is damaged"):
        partition.CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="not a complete glide_ray checkpoint"):
        partition.CheckpointReader(tmp_path / "none")


def test_a_rank_fetches_only_the_files_with_its_slices(s3, s3_faults, tmp_path):
    """Three files on S3: a rank of three needs one of them, a rank of two needs two."""
    tensors = {"a": torch.randn(42), "b": torch.randn(12)}
    cut_into(tmp_path / "local", tensors, 3)
    put_checkpoint(tmp_path / "local", f"{s3}/parts/1")

    def slices(rank, ranks):
        return [
            partition.ParamSlice(name, tuple(tensor.shape), rank * count, count, 0, 0)
            for name, tensor in tensors.items()
            for count in [tensor.numel() // ranks]
        ]

    for rank, ranks, fetched in [(2, 3, [2]), (0, 2, [0, 1])]:
        folder = partition.fetch_parts(
            f"{s3}/parts/1", tmp_path / f"cache-{rank}-{ranks}", slices(rank, ranks)
        )
        names = sorted(path.name for path in folder.iterdir())
        expected = [f"part.{number}.safetensors" for number in fetched]
        assert names == ["complete.json", *expected, "progress.json"]
        with partition.CheckpointReader(folder) as parts:
            for own in slices(rank, ranks):
                found = parts.read_slice("average/0.9", own.name, own.start, own.count)
                assert torch.equal(found, tensors[own.name][own.start : own.start + own.count])


@pytest.mark.parametrize("place", [0, 4, -1], ids=["length", "header", "tensor"])
def test_a_damaged_file_on_s3_is_named(s3, tmp_path, place):
    cut_into(tmp_path / "local", {"a": torch.randn(40)}, 2)
    put_checkpoint(tmp_path / "local", f"{s3}/parts/damaged")
    path = tmp_path / "local" / "part.1.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    storage.put(bytes(data), f"{s3}/parts/damaged/part.1.safetensors")
    whole = [partition.ParamSlice("a", (40,), 0, 40, 0, 0)]
    with pytest.raises(UserError, match="part.1.safetensors is damaged"):
        partition.fetch_parts(f"{s3}/parts/damaged", tmp_path / "cache", whole)


def put_checkpoint(folder, target):
    """Store a checkpoint's files with their manifest."""
    (folder / "progress.json").write_text("{}")
    manifest = {file.name: (file.stat().st_size, storage.digest(file)) for file in folder.iterdir()}
    for name in manifest:
        storage.put(folder / name, f"{target}/{name}")
    storage.put(json.dumps(manifest).encode(), f"{target}/{COMPLETE}")


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    from glide_ray.train.loop import Trainer

    _, saved, _ = run(Trainer(preset("steps=3")), tmp_path)
    names = sorted(path.name for path in saved[0].rglob("*"))
    assert names == ["part.0.safetensors", "preset.json", "progress.json"]


def test_an_exported_checkpoint_is_a_model_that_samples(tmp_path):
    from glide_ray.train.loop import Trainer

    _, saved, _ = run(Trainer(preset("steps=3", "ema_rates=0.9,0.5")), tmp_path)
    for rate in (None, 0.5):
        partition.export_average(saved[0], tmp_path / "w.safetensors", rate)
        model, config = load_model(tmp_path / "w.safetensors")
        state = contents(saved[0])
        assert config == preset().model and all(
            torch.equal(tensor, state[f"average/{rate or 0.9:g}", name])
            for name, tensor in model.state_dict().items()
        )


def test_glide_export_takes_the_last_checkpoint_that_is_whole_and_says_what_it_was(
    tmp_path, capsys
):
    from glide_ray.cli.main import main
    from glide_ray.train.loop import Trainer

    _, saved, _ = run(Trainer(preset()), tmp_path)
    checkpoints = Checkpoints(tmp_path / "run")
    for step, folder in ((2, saved[0]), (4, saved[1])):
        Path(checkpoints.path).mkdir(parents=True, exist_ok=True)
        folder.rename(checkpoints.folder(step, "x"))
        checkpoints.complete(checkpoints.folder(step, "x"), {})
    Path(checkpoints.folder(6, "x")).mkdir()  # an incomplete upload of a killed run
    assert main(["export", str(tmp_path / "run")]) == 0
    assert "exported.safetensors: nano-base after step 4, EMA rate 0.9" in capsys.readouterr().out
    assert load_model(tmp_path / "run" / "exported.safetensors")[1] == preset().model
    for arguments, message in (
        ([str(tmp_path)], "is neither a checkpoint nor a run with one"),
        ([str(tmp_path / "run"), "--ema-rate", "0.5"], "holds no average/0.5; it has average/0.9"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
