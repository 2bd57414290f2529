"""Scenes composed from the emoji corpus: the pictures show what their labels say."""

import time
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from glide_ray.data import emoji, scenes
from glide_ray.data.captions import NUMBERS, plural, with_article
from glide_ray.data.card import read_card
from glide_ray.data.images import decode
from glide_ray.data.scene_shards import SceneError, scene_row, write_scenes
from glide_ray.data.scenes import compose
from glide_ray.data.shards import read_shard, write_shards
from glide_ray.data.splits import is_held_out, is_held_out_colour
from glide_ray.data.sprites import COLOURS, read_sprites, recolour
from glide_ray.errors import ConfigError

SCENES = 400


@pytest.fixture(scope="module")
def sprites(emoji_corpus, tmp_path_factory):
    return read_sprites(str(emoji_corpus[0] / "train"), tmp_path_factory.mktemp("sprites"))


@pytest.fixture(scope="module")
def composed(sprites):
    """Scenes by kind."""
    all_scenes = [compose(sprites, 0, number) for number in range(SCENES)]
    return {
        kind: [scene for scene in all_scenes if scene.labels["scene"] == kind]
        for kind in scenes.KINDS
    }


@pytest.fixture(scope="module")
def with_scenes(emoji_corpus, tmp_path_factory):
    """The folder of a corpus that has scenes in addition to its pictures."""
    out = tmp_path_factory.mktemp("scenes")
    for folder in emoji_corpus[0].iterdir():
        (out / folder.name).symlink_to(folder)
    emoji.build_corpus(out, styles=("3D render", "Firefox"), scenes=SCENES)
    return out


def samples(folder):
    return [sample for path in sorted(folder.glob("*.tar")) for sample in read_shard(path)]


def nearest_colour(rgb):
    return min(COLOURS, key=lambda name: np.linalg.norm(np.subtract(COLOURS[name], rgb)))


def cut_out(image, box):
    left, top, right, bottom = box
    return np.asarray(image)[top:bottom, left:right]


def overlap(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_a_scene_is_the_same_for_the_same_seed_and_number(sprites):
    first, again, other = (compose(sprites, seed, 7) for seed in (0, 0, 1))
    assert first.image.tobytes() == again.image.tobytes() and first.labels == again.labels
    assert other.image.tobytes() != first.image.tobytes()


def test_the_kinds_of_scenes_have_their_shares(composed):
    for kind, share in scenes.KINDS.items():
        assert abs(len(composed[kind]) / SCENES - share) < 0.07


def test_a_background_has_the_colour_that_the_caption_names(composed):
    for scene in composed["background"]:
        colour, name = scene.labels["background"], scene.labels["objects"][0]["name"].lower()
        box = scene.labels["boxes"][0]
        outside = np.ones((256, 256), bool)
        outside[box[1] : box[3], box[0] : box[2]] = False
        assert (np.asarray(scene.image)[outside] == COLOURS[colour]).all()
        assert (
            scene.captions[0]
            == f"{with_article(name)}, {scene.labels['style']}, on {with_article(colour)} "
            "background"
        )


def test_a_recoloured_object_has_the_colour_that_the_caption_names_and_keeps_its_shading(composed):
    right = 0
    for scene in composed["recolour"]:
        colour, (box,) = scene.labels["colour"], scene.labels["boxes"]
        pixels = cut_out(scene.image, box).reshape(-1, 3)
        background = COLOURS[scene.labels["background"] or "white"]
        pixels = pixels[(np.abs(pixels.astype(int) - background) > 6).any(1)]
        right += nearest_colour(np.median(pixels, 0)) == colour
        assert len(np.unique(pixels @ [65536, 256, 1])) > 20
        assert f"{colour} {scene.labels['objects'][0]['name'].lower()}" in scene.captions[0]
    assert right > 0.95 * len(composed["recolour"])


def test_white_objects_are_on_a_background_of_another_colour(composed):
    white = [scene for scene in composed["recolour"] if scene.labels["colour"] == "white"]
    assert white and all(scene.labels["background"] not in (None, "white") for scene in white)


def test_a_scene_shows_as_many_objects_as_its_caption_says_without_overlap(composed):
    counts = Counter(scene.labels["count"] for scene in composed["count"])
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 5
    for scene in composed["count"]:
        count, boxes = scene.labels["count"], scene.labels["boxes"]
        assert len(boxes) == len(scene.labels["objects"]) == count
        assert not any(overlap(a, b) for a, b in combinations(boxes, 2))
        assert all((cut_out(scene.image, box) < 250).any() for box in boxes)
        name = scene.labels["objects"][0]["name"].lower()
        assert scene.captions[0].startswith(
            f"{NUMBERS[count]} {name if count == 1 else plural(name)}, "
        )


def test_two_objects_have_the_relation_that_the_caption_names(composed):
    for scene in composed["relation"]:
        first, second = scene.labels["boxes"]
        relations = {
            "to the left of": first[2] <= second[0],
            "to the right of": second[2] <= first[0],
            "above": first[3] <= second[1],
            "below": second[3] <= first[1],
        }
        assert [relation for relation, holds in relations.items() if holds] == [
            scene.labels["relation"]
        ]
        a, b = (with_article(thing["name"].lower()) for thing in scene.labels["objects"])
        assert (
            scene.captions[0] == f"{a} {scene.labels['relation']} {b}, {scene.labels['style']}"
            and a != b
        )


def test_the_boxes_of_a_scene_contain_its_objects_completely(composed):
    for scene in composed["count"] + composed["relation"]:
        for left, top, right, bottom in scene.labels["boxes"]:
            assert 0 <= left < right <= 256 and 0 <= top < bottom <= 256
            assert (cut_out(scene.image, (left, top, right, bottom)) < 254).any()
    blank = np.asarray(composed["relation"][0].image).copy()
    for left, top, right, bottom in composed["relation"][0].labels["boxes"]:
        blank[top:bottom, left:right] = 255
    assert (blank == 255).all()


def test_scenes_show_only_things_of_the_training_split(sprites):
    shown = [sprite.emoji for style_sprites in sprites.styles.values() for sprite in style_sprites]
    assert shown and not any(map(is_held_out, shown))


def test_names_with_a_colour_are_not_recoloured(sprites):
    named = {sprite.name for style in sprites.styles for sprite in sprites.counted[style]}
    assert {"fox", "house"} <= named and not named & {
        "red apple",
        "green book",
        "French flag",
        "grapes",
    }


def test_white_stays_lighter_than_black_when_an_object_is_recoloured(sprites):
    fox = next(sprite for sprite in sprites.counted["3D render"] if sprite.name == "fox")
    picture = sprites.picture(fox)
    purple = recolour(picture, "purple")
    assert purple.getchannel("A").tobytes() == picture.getchannel("A").tobytes()
    before, after = (
        np.asarray(image.convert("L"), float)[np.asarray(picture)[..., 3] == 255]
        for image in (picture, purple)
    )
    assert np.corrcoef(before, after)[0, 1] > 0.9


def test_captions_have_correct_plurals_and_articles():
    assert [
        plural(name)
        for name in (
            "star",
            "wine glass",
            "fox",
            "cherry",
            "monkey",
            "maple leaf",
            "sheep",
            "mouse",
            "tomato",
        )
    ] == [
        "stars",
        "wine glasses",
        "foxes",
        "cherries",
        "monkeys",
        "maple leaves",
        "sheep",
        "mice",
        "tomatoes",
    ]
    assert [
        with_article(name)
        for name in ("unicorn", "hourglass", "octopus", "bus", "scissors", "bread", "ear of corn")
    ] == ["a unicorn", "an hourglass", "an octopus", "a bus", "scissors", "bread", "an ear of corn"]


def test_held_out_pairs_of_thing_and_colour_are_in_no_training_scene(with_scenes):
    train, held_out = samples(with_scenes / "scenes"), samples(with_scenes / "held_out_colours")
    assert len(train) + len(held_out) == SCENES and 0.02 < len(held_out) / SCENES < 0.12

    def pairs(rows):
        return [
            [
                (thing["emoji"], row.meta[name])
                for thing in row.meta["objects"]
                for name in ("colour", "background")
                if row.meta[name]
            ]
            for row in rows
        ]

    assert not any(
        is_held_out_colour(*pair) for scene_pairs in pairs(train) for pair in scene_pairs
    )
    assert all(
        any(is_held_out_colour(*pair) for pair in scene_pairs) for scene_pairs in pairs(held_out)
    )
    card = read_card(with_scenes / "scenes")
    assert (
        card["rows"] == len(train) == sum(card["kinds"].values())
        and card["sources"][0]["licence"] == "MIT"
    )


def test_shards_contain_the_composed_scenes(with_scenes, composed):
    row = next(row for row in samples(with_scenes / "scenes") if row.meta["scene"] == "relation")
    scene = next(
        scene for scene in composed["relation"] if list(scene.captions) == list(row.captions)
    )
    assert row.meta["boxes"] == scene.labels["boxes"]
    assert np.abs(np.asarray(decode(row.image)).astype(int) - np.asarray(scene.image)).mean() < 3


def test_an_existing_corpus_with_another_number_of_scenes_is_refused(with_scenes):
    with pytest.raises(
        ConfigError, match=f"already has {SCENES} scenes, and --scenes asks for 500"
    ):
        emoji.build_corpus(with_scenes, styles=("3D render", "Firefox"), scenes=500)
    assert emoji.build_corpus(with_scenes, styles=("3D render", "Firefox"))["scenes"]["count"] > 0


def test_more_scenes_than_fit_on_the_disk_are_refused_before_anything_is_written(
    emoji_corpus, tmp_path
):
    with pytest.raises(
        SceneError,
        match=r"1,000,000,000,000 scenes take about .* GB free; ask for at most --scenes \d+",
    ):
        emoji.build_corpus(tmp_path, scenes=10**12)
    assert not list(tmp_path.iterdir())


def test_a_corpus_with_too_few_objects_for_scenes_is_refused(emoji_corpus, tmp_path):
    flags = [row for row in samples(emoji_corpus[0] / "train") if row.meta["group"] == "Flags"]
    write_shards(tmp_path / "train", flags[:20])
    with pytest.raises(SceneError, match="has no two objects to compose scenes from; choose more"):
        write_scenes(str(tmp_path), 10)


def test_one_core_composes_at_least_100_scenes_per_second(sprites):
    began = time.process_time()
    for number in range(200):
        scene_row(sprites, 0, number)
    rate = 200 / (time.process_time() - began)
    print(f"{rate:.0f} scenes a second and core")
    assert rate > 100


def test_the_weapon_rule_finds_a_weapon_in_a_scene():
    from glide_ray.data.filters import Candidate
    from glide_ray.data.shards import Sample

    scene = Sample(
        "k",
        b"",
        "jpg",
        ("a fox above a dagger",),
        {"emoji": "1f98a", "objects": [{"emoji": "1f98a"}, {"emoji": "1f5e1"}]},
    )
    assert emoji.shows_weapon(Candidate(scene)) and not emoji.shows_people(Candidate(scene))
