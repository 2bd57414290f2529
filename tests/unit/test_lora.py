"""Low-rank adapters: their mathematics, training, files, and use in every command."""

import json
import re

import pytest
import torch
from helpers.tiny import random_model, tiny
from helpers.training import averaged, epochs, run
from helpers.training import preset as training_preset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glide_ray.cli.main import main
from glide_ray.config.lora import AdapterConfig, Lora, read_lora
from glide_ray.config.training import PARTS
from glide_ray.errors import ConfigError, UserError
from glide_ray.models.cost import example_conditioning
from glide_ray.models.lora import DOWN, UP, Adapter, add_adapters, merge
from glide_ray.models.weights import load_config, load_unet, load_weights, save_weights
from glide_ray.sampling.cascade import Cascade
from glide_ray.sampling.recipe import read_recipe
from glide_ray.storage import fingerprint
from glide_ray.train.checkpoint import CheckpointError
from glide_ray.train.loop import Trainer
from glide_ray.train.partition import export_average
from glide_ray.train.samples import held_out_of_average, sample_grid
from glide_ray.train.single import SingleTrainer
from glide_ray.train.trained_part import part_of, trained_parameters

CONFIG = AdapterConfig(base="tiny", base_sha256="", role="base", rank=4, alpha=2)


def adapter_of(model, scale=1.0, config=CONFIG):
    tensors = {name: one for name, one in model.state_dict().items() if ".lora." in name}
    return Adapter(Lora(path="a", scale=scale), config, tensors)


def adapted(seed=0, factor=1.0):
    """A tiny model with random adapters of rank 4; `factor` multiplies their up matrices."""
    unet = tiny().model.unet
    model = random_model(unet)
    torch.manual_seed(seed)
    add_adapters(model, 4, 2.0)
    for name, one in model.named_parameters():
        if name.endswith(UP):
            one.data.copy_(factor * 0.1 * torch.randn_like(one))
    return model


def output(model):
    torch.manual_seed(1)
    conditioning = example_conditioning(tiny().model, 2)
    with torch.no_grad():
        made = model(torch.randn(2, 3, 16, 16), torch.tensor([10, 900]), conditioning)
    return torch.cat([made.eps, made.variance])


# -- mathematics -----------------------------------------------------------------------------------


def test_an_untrained_adapter_changes_nothing():
    model = random_model(tiny().model.unet)
    before = output(model)
    add_adapters(model, 4, 8.0)
    assert torch.equal(output(model), before)


def test_adapters_cover_every_linear_layer_and_convolution():
    plain = random_model(tiny().model.unet)
    layers = [
        name
        for name, one in plain.named_modules()
        if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)
    ]
    found = {name.removesuffix(UP) for name in adapter_of(adapted()).tensors if name.endswith(UP)}
    assert found == set(layers) and len(layers) > 20


@pytest.mark.parametrize("scale", [1.0, 0.5, -0.7])
def test_merged_weights_compute_what_adapters_add_to_the_layers_outputs(scale):
    model, plain = adapted(factor=scale), random_model(tiny().model.unet)
    added = output(model)
    plain.load_state_dict(merge(plain.state_dict(), adapter_of(adapted(), scale)))
    assert torch.allclose(output(plain), added, atol=2e-5)
    assert not torch.allclose(added, output(random_model(tiny().model.unet)), atol=1e-2)


def test_the_change_of_a_convolution_is_the_product_of_its_matrices():
    down, up = torch.randn(4, 5, 3, 3), torch.randn(7, 4, 1, 1)
    one = Adapter(Lora(path="a", scale=3.0), CONFIG, {f"x{DOWN}": down, f"x{UP}": up})
    expected = 3 * 2 / 4 * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    assert torch.allclose(one.change("x"), expected, atol=1e-5)
    zero = torch.zeros(7, 5, 3, 3)
    assert torch.allclose(merge({"x.weight": zero}, one)["x.weight"], expected, atol=1e-5)


def test_adapters_add_up_in_any_order_and_a_scale_of_zero_leaves_the_base():
    state = random_model(tiny().model.unet).state_dict()
    first, second = adapter_of(adapted(1)), adapter_of(adapted(2), 0.3)
    there = merge(merge(state, first), second)
    back = merge(merge(state, second), first)
    assert all(torch.allclose(there[name], back[name], atol=1e-6) for name in state)
    none = merge(state, adapter_of(adapted(1), 0.0))
    assert all(torch.equal(none[name], state[name]) for name in state)


def test_the_rank_of_a_small_layer_is_its_own():
    model = random_model(tiny().model.unet)
    add_adapters(model, 10_000, 1.0)
    tensors = adapter_of(model).tensors
    assert tensors[f"out{UP}"].shape[1] == min(6, tensors[f"out{DOWN}"][0].numel())


@pytest.mark.parametrize(
    "text, path, scale",
    [
        ("a.safetensors", "a.safetensors", 1),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("s3://b/a.safetensors", "s3://b/a.safetensors", 1),
        ("s3://b/a.safetensors:-1", "s3://b/a.safetensors", -1),
        ("C:/a.safetensors", "C:/a.safetensors", 1),
    ],
)
def test_an_adapter_is_written_as_a_file_and_a_scale(text, path, scale):
    lora = read_lora(text)
    assert (lora.path, lora.scale) == (path, scale)
    assert read_lora(str(lora)) == lora


@pytest.mark.parametrize("scale", ["", "big", "nan", "inf", "0,5"])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ConfigError, match=r"a\.safetensors.*not a number; write"):
        read_lora(f"a.safetensors:{scale}")


# -- training --------------------------------------------------------------------------------------


@pytest.fixture
def settings(tiny_weights):
    """A function that makes a preset of six steps which starts from the tiny base model."""

    def make(*more):
        return training_preset(f"start_from={tiny_weights['base']}", "learning_rate=0.01", *more)

    return make


def test_training_changes_the_adapter_alone_and_begins_at_the_base(settings, tiny_weights):
    _, base = load_weights(tiny_weights["base"])
    trainer, whole = SingleTrainer(settings("lora_rank=4")), SingleTrainer(settings())
    metrics = run(trainer)[0]
    assert metrics[0] == run(whole)[0][0]  # held-out loss of step 0
    assert metrics[-1]["held_out"] < metrics[0]["held_out"]
    state = trainer.network.state_dict()
    assert all(torch.equal(state[name], base[name]) for name in base)
    assert all(one.grad is None for name, one in trainer.network.named_parameters())
    assert trainer.names and all(name.endswith((DOWN, UP)) for name in trainer.names)
    assert all(state[name].any() for name in trainer.names if name.endswith(UP))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_trains_the_same_adapter(settings, stage, tmp_path):
    preset = settings("lora_rank=4", f"zero_stage={stage}")
    single, sharded = SingleTrainer(preset), Trainer(preset)
    expected, (_, saved, found) = run(single)[2], run(sharded, tmp_path)
    assert found.keys() == expected.keys() and len(found) > 40
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)
    resumed = Trainer(preset)
    resumed.load(saved[0])
    again = run(resumed)[2]
    assert all(torch.allclose(again[name], found[name], atol=1e-5) for name in found)


@pytest.mark.parametrize("trainer", [SingleTrainer, Trainer])
@pytest.mark.parametrize("freeze", ["text", "convolutions,attention", "text,convolutions"])
def test_frozen_parts_stay_as_they_are(settings, tiny_weights, tmp_path, trainer, freeze):
    made = trainer(settings(f"freeze={freeze}"))
    saved = run(made, tmp_path)[1]
    names = set(averaged(made))
    assert {part_of(name) for name in names} == set(PARTS) - set(freeze.split(","))
    export_average(saved[-1], tmp_path / "weights.safetensors")
    (config, found), (_, base) = (
        load_weights(path) for path in (tmp_path / "weights.safetensors", tiny_weights["base"])
    )
    assert load_unet(tmp_path / "weights.safetensors", "base")[1] == config
    changed = {name for name in base if not torch.equal(found[name], base[name])}
    assert changed <= names and {part_of(name) for name in changed} == {
        part_of(name) for name in names
    }


def test_adapters_leave_out_frozen_parts(settings):
    trainer = SingleTrainer(settings("lora_rank=2", "freeze=text,convolutions"))
    assert {part_of(name) for name in trained_parameters(trainer.network)} == {"attention"}


def test_sixteen_bit_training_keeps_exact_masters(settings):
    trainer = SingleTrainer(settings("lora_rank=4", "precision=bf16"))
    trainer.step(epochs(0, 0), 1)
    assert {one.dtype for one in trainer.masters} == {torch.float32}
    assert {one.dtype for one in trainer.network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (["start_from=none"], "train.lora_rank keeps weights of train.start_from.*none without"),
        (["lora_rank=none", "freeze=text", "start_from=none"], "train.freeze keeps weights"),
        (["freeze=text,attention,convolutions"], "freeze names all parts"),
        (["lora_rank=0"], "lora_rank.*greater than 0"),
        (["freeze=head"], "freeze.*'text', 'attention' or 'convolutions'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        settings("lora_rank=4", *wrong)


def test_a_checkpoint_of_other_weights_is_refused(settings, tmp_path, tiny_weights):
    copy = tmp_path / "base.safetensors"
    copy.write_bytes(tiny_weights["base"].read_bytes())
    preset = settings("lora_rank=4", f"start_from={copy}")
    saved = run(SingleTrainer(preset), tmp_path / "run")[1]
    config, state = load_weights(copy)
    save_weights(copy, {name: 2 * one for name, one in state.items()}, config)
    with pytest.raises(CheckpointError, match=r"have changed since the run began.*old file back"):
        SingleTrainer(preset).load(saved[-1])


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_weights):
    """Adapters of the tiny base model and upsampler, as files by role, and the base's preset."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    preset = training_preset(
        f"start_from={tiny_weights['base']}", "lora_rank=4", "learning_rate=0.01"
    )
    saved = run(SingleTrainer(preset), folder / "run")[1]
    found["base"] = folder / "base-adapter.safetensors"
    export_average(saved[-1], found["base"])
    _, state = load_weights(tiny_weights["upsampler"])
    about = AdapterConfig(
        base="nano-upsampler",
        base_sha256=fingerprint(tiny_weights["upsampler"]),
        role="upsampler",
        rank=1,
        alpha=1,
    )
    weight, torch_seed = state["out.weight"], torch.Generator().manual_seed(0)
    tensors = {
        f"out{DOWN}": torch.randn(1, *weight.shape[1:], generator=torch_seed),
        f"out{UP}": torch.randn(len(weight), 1, 1, 1, generator=torch_seed),
    }
    found["upsampler"] = folder / "upsampler-adapter.safetensors"
    save_file(tensors, found["upsampler"], {"adapter": about.model_dump_json()})
    return found, preset


def test_the_file_of_an_adapter_names_its_base(trained, tiny_weights):
    files, _ = trained
    with safe_open(files["base"], "pt") as file:
        metadata = file.metadata()
    about = AdapterConfig.model_validate_json(metadata["adapter"])
    assert about.base_sha256 == fingerprint(tiny_weights["base"]) and about.role == "base"
    assert (about.rank, about.alpha, about.base) == (4, 8.0, "nano-base")
    assert metadata["weights"] == "ema" and metadata["step"] == "4"
    with pytest.raises(UserError, match="is an adapter.*give it with --lora"):
        load_config(files["base"])


def test_grids_and_losses_of_a_run_use_the_adapter(trained, tiny_weights, drawn_corpus):
    files, preset = trained
    data = {"corpus": str(drawn_corpus / "train"), "held_out": str(drawn_corpus / "held_out")}
    preset = preset.model_copy(
        update={"data": preset.data.model_copy(update={**data, "min_size": 16})}
    )
    plain, better = (
        held_out_of_average(path, preset, 4) for path in (tiny_weights["base"], files["base"])
    )
    assert plain.keys() == better.keys() and plain != better
    assert sample_grid(files["base"], preset) is not None


def test_a_cascade_adds_each_adapter_to_its_own_model(trained, tiny_weights):
    files, _ = trained
    names = [str(files["base"]), f"{files['upsampler']}:0.5"]
    plain, both = (
        Cascade.load(tiny_weights["base"], tiny_weights["upsampler"], "fp32", loras=loras)
        for loras in ((), names)
    )
    expected = merge(plain.base.model.state_dict(), _read(files["base"], 1.0))
    assert all(
        torch.equal(one, expected[name]) for name, one in both.base.model.state_dict().items()
    )
    expected = merge(plain.upsampler.model.state_dict(), _read(files["upsampler"], 0.5))
    found = both.upsampler.model.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in found.items())
    assert both.loras == (Lora(path=names[0]), Lora(path=str(files["upsampler"]), scale=0.5))


def _read(path, scale):
    with safe_open(path, "pt") as file:
        config = AdapterConfig.model_validate_json(file.metadata()["adapter"])
    return Adapter(Lora(path=str(path), scale=scale), config, load_file(path))


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture
def generate(tiny_weights, tmp_path):
    def call(*more):
        out = tmp_path / "a.png"
        files = ["--base", str(tiny_weights["base"]), "--upsampler", str(tiny_weights["upsampler"])]
        few = ["--steps", "2", "--upsampler-steps", "2", "--out", str(out)]
        code = main(["generate", "a red dog", *files, *few, *map(str, more)])
        return code, out.read_bytes() if out.exists() else b""

    return call


def test_generate_adds_adapters_and_a_picture_is_reproducible(trained, generate, capsys, tmp_path):
    (base, upsampler), (_, plain) = trained[0].values(), generate()
    code, first = generate("--lora", base, "--lora", f"{upsampler}:0.5")
    assert code == 0 and first != plain
    assert main(["reproduce", str(tmp_path / "a.png")]) == 0
    assert "the same as" in capsys.readouterr().out
    assert generate("--lora", base, "--lora", f"{upsampler}:0.6")[1] != first
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(base.read_bytes())
    assert generate("--lora", moved)[0] == 0
    moved.unlink()
    assert main(["reproduce", str(tmp_path / "a.png")]) == 2
    assert re.search("moved.*not there.*--lora", capsys.readouterr().err)
    assert main(["reproduce", str(tmp_path / "a.png"), "--lora", str(base)]) == 0
    assert "the same as" in capsys.readouterr().out


def test_what_is_no_adapter_of_these_weights_is_refused_in_one_sentence(
    trained, generate, tiny_weights, tmp_path, capsys
):
    files, damaged, cut, crafted = (
        trained[0],
        *(tmp_path / f"{name}.safetensors" for name in ("damaged", "cut", "crafted")),
    )
    damaged.write_bytes(b"x" * 100)
    cut.write_bytes(files["base"].read_bytes()[:-8])
    about = json.dumps({**AdapterConfig.model_validate_json(_about(files["base"])).model_dump()})
    save_file({f"out{DOWN}": torch.zeros(1, 2)}, crafted, {"adapter": about})
    other = tmp_path / "other.safetensors"
    config, state = load_weights(tiny_weights["base"])
    save_weights(other, {name: one + 1 for name, one in state.items()}, config)
    for options, sentence in (
        (["--lora", tmp_path / "gone.safetensors"], "no adapter .*gone.*--lora"),
        (["--lora", damaged], "damaged.safetensors is not a whole"),
        (["--lora", cut], "cut.safetensors is not a whole"),
        (["--lora", crafted], "crafted.safetensors is damaged: its tensors do not fit"),
        (["--lora", tiny_weights["base"]], "is no adapter.*--base"),
        (["--lora", files["base"], "--base", other], "adapter of nano-base.*with --base"),
        (["--lora", files["upsampler"], "--no-upsampler"], "adapter of an upsampler, and none"),
        (["--base", files["base"]], "is an adapter.*with --lora"),
    ):
        assert generate(*options)[0] == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(sentence, error), error
    with pytest.raises(SystemExit):
        generate("--lora", f"{files['base']}:big")
    assert "the scale 'big' of the adapter is not a number" in capsys.readouterr().err


def _about(path):
    with safe_open(path, "pt") as file:
        return file.metadata()["adapter"]


@pytest.mark.parametrize("half", [False, True])
def test_export_writes_merged_weights(trained, tiny_weights, generate, tmp_path, half):
    file, merged = trained[0]["base"], tmp_path / "merged.safetensors"
    words = ["export", str(tiny_weights["base"]), "--lora", f"{file}:0.5", "--out", str(merged)]
    assert main([*words, *(["--half"] if half else [])]) == 0
    expected = merge(load_weights(tiny_weights["base"])[1], _read(file, 0.5))
    _, found = load_weights(merged)
    assert all(torch.allclose(found[name].float(), expected[name], atol=2e-3) for name in expected)
    assert {one.dtype for one in found.values()} == {torch.float16 if half else torch.float32}


def test_tune_trains_an_adapter_that_generate_adds(tiny_weights, drawn_corpus, tmp_path):
    run_folder = tmp_path / "run"
    words = ["tune", str(tiny_weights["base"]), str(drawn_corpus / "held_out"), "--lora", "2"]
    few = ["--set", "steps=2", "--set", "trackers=", "--set", "sample_every=none"]
    assert main([*words, "--out", str(run_folder), *few]) == 0
    picture = tmp_path / "a.png"
    file = run_folder / "adapter.safetensors"
    words = ["generate", "a fox", "--base", str(tiny_weights["base"]), "--no-upsampler"]
    assert main([*words, "--steps", "2", "--lora", f"{file}:0.7", "--out", str(picture)]) == 0
    assert read_recipe(picture)[0].loras[0].scale == 0.7
