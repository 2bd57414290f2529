"""Presets: the model sizes of the paper and the release, counted on the meta device."""

import json

import pytest
import torch
from helpers.paths import GOLDEN

from glide_ray.config import data, models, presets, sampling, serving, training
from glide_ray.config.overrides import override
from glide_ray.errors import ConfigError
from glide_ray.models.checkpoint_file import ReleasedError
from glide_ray.models.clip import NoisedClip
from glide_ray.models.released import clip_to_released, from_released, to_released
from glide_ray.models.unet import GlideUNet

SHAPES = json.loads((GOLDEN / "openai_state_dict_shapes.json").read_text())
RELEASED = {
    "base": ("filtered-base", False),
    "base-inpaint": ("filtered-base", True),
    "upsample": ("filtered-upsampler", False),
    "upsample-inpaint": ("filtered-upsampler", True),
}


def count(unet):
    with torch.device("meta"):
        model = GlideUNet(unet)
    return sum(p.numel() for p in model.parameters()), sum(
        p.numel() for p in model.text.parameters()
    )


@pytest.mark.parametrize("name, millions", [("paper-base", 3554), ("paper-upsampler", 1541)])
def test_paper_presets_have_the_papers_parameter_counts(name, millions):
    assert round(count(presets.get(name).model.unet)[0] / 1e6) == millions


@pytest.mark.parametrize(
    "name, millions", [("filtered-base", 385.03), ("filtered-upsampler", 398.36)]
)
def test_released_presets_have_the_released_parameter_counts(name, millions):
    assert round(count(presets.get(name).model.unet)[0] / 1e6, 2) == millions


def test_the_visual_part_of_the_paper_base_is_2_24_billion():
    whole, text = count(presets.get("paper-base").model.unet)
    assert round((whole - text) / 1e9, 2) == 2.24


@pytest.mark.parametrize("checkpoint", RELEASED)
def test_every_key_of_a_released_checkpoint_is_loaded_with_its_shape(checkpoint):
    name, inpaint = RELEASED[checkpoint]
    unet = presets.get(name).model.unet.model_copy(update={"inpaint": inpaint})
    released = {key: torch.empty(shape, device="meta") for key, shape in SHAPES[checkpoint].items()}
    ours = from_released(released, unet)
    with torch.device("meta"):
        GlideUNet(unet).load_state_dict(ours, strict=True)
    back = to_released(ours, unet)
    assert {key: list(tensor.shape) for key, tensor in back.items()} == SHAPES[checkpoint]


def test_a_missing_unexpected_or_misshapen_key_of_a_released_checkpoint_is_named():
    unet = presets.get("filtered-base").model.unet
    released = {key: torch.empty(shape, device="meta") for key, shape in SHAPES["base"].items()}
    with pytest.raises(ReleasedError, match="'final_ln.bias' is missing"):
        from_released(
            {key: tensor for key, tensor in released.items() if key != "final_ln.bias"}, unet
        )
    with pytest.raises(ReleasedError, match="'surprise' is unexpected"):
        from_released(released | {"surprise": torch.empty(1, device="meta")}, unet)
    with pytest.raises(
        ReleasedError, match=r"input_blocks.0.0.weight has the shape \[192, 7, 3, 3\]"
    ):
        from_released(
            released | {"input_blocks.0.0.weight": torch.empty(192, 7, 3, 3, device="meta")}, unet
        )


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_is_unchanged_by_a_round_trip_through_json(name):
    preset = presets.get(name)
    assert training.Preset.model_validate_json(preset.model_dump_json()) == preset
    assert preset.model.name == name


@pytest.mark.parametrize("name", [name for name in presets.PRESETS if name.endswith("-inpaint")])
def test_an_inpainting_preset_adds_four_channels_to_its_model_and_starts_from_its_weights(name):
    before, after = presets.get(name.removesuffix("-inpaint")), presets.get(name)
    assert (
        after.model.unet.in_channels == before.model.unet.in_channels + 4
        and after.data.empty_caption_rate == 0.2
    )
    assert (
        after.train.start_from
        and after.model.unet.model_copy(update={"inpaint": False}) == before.model.unet
    )


@pytest.mark.parametrize(
    "name", ["paper-base", "paper-upsampler", "filtered-base", "filtered-upsampler"]
)
def test_fine_tuning_for_guidance_empties_20_percent_of_captions_and_keeps_the_model(name):
    before, after = presets.get(name), presets.get(f"{name}-guided")
    assert before.data.empty_caption_rate == 0 and after.data.empty_caption_rate == 0.2  # sec. 4.2
    assert (
        after.model.unet == before.model.unet
        and after.train.start_from == f"runs/{name}/weights.safetensors"
    )


@pytest.mark.parametrize("name", ["paper-base-guided", "filtered-upsampler-inpaint"])
def test_a_fine_tuning_preset_warms_up_and_clips_and_its_learning_rate_follows_the_batch(name):
    before, after = presets.get(name.rpartition("-")[0]).train, presets.get(name).train
    assert before.warmup_steps == before.clip_norm == 0
    assert after.warmup_steps == 1000 and after.clip_norm == 1
    quarter = presets.with_settings(name, [f"batch={after.batch // 4}"]).train
    assert quarter.learning_rate == pytest.approx(after.learning_rate / 2, rel=1e-5)
    assert (
        presets.with_settings(name, ["batch=64", "learning_rate=1e-5"]).train.learning_rate == 1e-5
    )
    assert presets.with_settings(name, ["steps=8"]).train.learning_rate == after.learning_rate
    # A run from the beginning keeps the paper's.
    base = presets.with_settings(name.rpartition("-")[0], ["batch=64"]).train
    assert base.learning_rate == before.learning_rate


def test_the_noised_clips_have_the_shapes_of_their_sources():
    large, base = (presets.get(f"noised-clip-{size}").model.clip for size in "lb")
    assert (large.image_layers, large.image_width, large.patch_size, large.image_size) == (
        24,
        1024,
        4,
        64,
    )
    # App. B.1 of the paper.
    assert (
        presets.get("noised-clip-l").train.weight_decay == 0.0125
        and presets.get("noised-clip-l").train.batch == 32 * 1024
    )
    with torch.device("meta"):
        released = NoisedClip(base.model_copy(update={"vocabulary": 65536}))
    assert {
        key: list(tensor.shape)
        for key, tensor in clip_to_released(released.state_dict())[0].items()
    } == SHAPES["clip/image-enc"]
    assert {
        key: list(tensor.shape)
        for key, tensor in clip_to_released(released.state_dict())[1].items()
    } == SHAPES["clip/text-enc"]


def test_the_error_of_a_clip_setting_names_the_setting_as_the_user_wrote_it():
    with pytest.raises(ConfigError, match="Setting model.clip.image_width: .*given: 'wide'"):
        override(presets.get("nano-clip"), ["model.clip.image_width=wide"])
    with pytest.raises(ConfigError, match="image_width 130 is not divisible by image_heads 4"):
        override(presets.get("nano-clip"), ["model.clip.image_width=130"])
    with pytest.raises(
        ConfigError, match="train.objective 'base' does not fit a model of the kind 'clip'"
    ):
        override(presets.get("nano-clip"), ["objective=base"])
    with pytest.raises(ConfigError, match="train.min_snr 5 weights the loss of denoising models"):
        override(presets.get("nano-clip"), ["min_snr=5"])


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="'paper-bass'; did you mean 'paper-base'"):
        presets.get("paper-bass")


def test_settings_are_overridden_by_name_and_checked():
    preset = override(
        presets.get("nano-base"),
        ["steps=7", "model.unet.multipliers=1,2", "data.corpus=s3://there/x"],
    )
    assert (preset.train.steps, preset.model.unet.multipliers, preset.data.corpus) == (
        7,
        (1, 2),
        "s3://there/x",
    )


@pytest.mark.parametrize(
    "setting, message",
    [
        ("train.stepps=3", "no setting 'train.stepps'; did you mean 'train.steps'"),
        ("lerning_rate=3", "no setting 'lerning_rate'; did you mean 'learning_rate'"),
        ("train.steps", "not of the form key=value"),
        ("train.steps=many", "Setting train.steps: .*given: 'many'"),
        ("train.steps=-4", "Setting train.steps: .*given: '-4'"),
        ("train.batch=33", "train.batch 33 is not divisible by train.workers 2; 32 is"),
        ("train.zero_stage=4", "Setting train.zero_stage"),
        ("data.held_out=", "Setting data.held_out: the path is empty"),
        ("data.corpus= ", "Setting data.corpus: the path is empty"),
    ],
)
def test_an_invalid_setting_is_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        override(presets.get("nano-base"), [setting])


@pytest.mark.parametrize("room", [data, models, sampling, serving, training])
def test_every_setting_has_a_description(room):
    configs = [
        kind
        for kind in vars(room).values()
        if isinstance(kind, type) and issubclass(kind, models.Frozen)
    ]
    missing = [
        f"{kind.__name__}.{name}"
        for kind in configs
        for name, field in kind.model_fields.items()
        if not field.description
    ]
    assert configs and not missing


@pytest.mark.parametrize("name", presets.PRESETS)
def test_models_of_presets_are_keys_of_caches(name):
    """Costs are remembered by model; a dict or list among the settings would have no hash."""
    assert len({presets.get(name).model, presets.get(name).model}) == 1
