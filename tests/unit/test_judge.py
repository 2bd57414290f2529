"""The judge of pictures: measurements, classifiers, and the accuracy that it reports."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import drawn_things as drawn
from PIL import Image, ImageDraw

from glide_ray.data.images import flatten
from glide_ray.data.sprites import COLOURS, recolour
from glide_ray.evaluation import fitting, regions, vocabulary
from glide_ray.evaluation.cases import CorpusError, make_cases
from glide_ray.evaluation.categories import (
    BACKGROUND,
    BACKGROUND_COLOUR,
    CATEGORIES,
    COLOUR,
    COUNT,
    INPAINTING,
    LAYOUT,
    MIN_ACCURACY,
    OBJECT_COLOUR,
    OBJECT_COUNT,
    PAIRS,
    POSITION,
    STYLE,
    THING,
)
from glide_ray.evaluation.judge import Judge, JudgeError
from glide_ray.evaluation.judge_accuracy import try_judge
from glide_ray.evaluation.regions import Regions, halves, part_areas, parts
from glide_ray.models.efficientnet import MissingNetworkError, load_efficientnet, normalise


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return str(drawn.write_corpus(tmp_path_factory.mktemp("things")))


@pytest.fixture(scope="module")
def judge(corpus):
    return fitting.fit(corpus, least_styles=2, scenes=150)


@pytest.fixture(scope="module")
def cases(corpus, judge):
    return make_cases(corpus, judge.vocabulary, 12)


def of(cases, category):
    return [case for case in cases if case.category == category]


def right(judge, cases, pictures, question):
    return np.mean([verdict[question].right for verdict in judge.verdicts(cases, pictures)])


def blobs(*boxes, colour=(200, 30, 30), background=(255, 255, 255), size=256):
    image = Image.new("RGB", (size, size), background)
    for box in boxes:
        ImageDraw.Draw(image).ellipse([edge * size / 256 for edge in box], fill=colour)
    return np.asarray(image)


# -- the network -----------------------------------------------------------------------------------


def test_the_network_recognises_a_daisy_in_a_photograph():
    from sklearn.datasets import load_sample_image

    square = Image.fromarray(load_sample_image("flower.jpg")[:, 106:533]).resize(
        (224, 224), Image.Resampling.BICUBIC
    )
    with torch.no_grad():
        logits = load_efficientnet()(
            normalise(torch.tensor(np.asarray(square)).permute(2, 0, 1)[None])
        )
    assert logits.argmax().item() == 985  # ImageNet's daisy


def test_weights_with_another_checksum_than_the_published_ones_are_not_loaded(tmp_path):
    other = tmp_path / "network.pth"
    torch.save({"weight": torch.zeros(3)}, other)
    with pytest.raises(MissingNetworkError, match="SHA-256 differs"):
        load_efficientnet(other)


# -- measurements ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [256, 64])
def test_every_named_background_is_recognised_under_noise(size):
    draws = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        picture = blobs((60, 80, 180, 200), colour=(120, 200, 40), background=colour, size=size)
        noisy = (picture + draws.normal(0, 12, picture.shape)).clip(0, 255).astype(np.uint8)
        assert Regions.of(noisy).background_name == name


def test_every_named_colour_of_a_shaded_object_is_recognised_at_both_sizes():
    for name in COLOURS:
        ground = Image.new("RGB", (256, 256), COLOURS["blue" if name == "white" else "white"])
        thing = recolour(drawn.draw_thing("a4", "3D render"), name)
        ground.paste(thing, (0, 0), thing)
        for size in (256, 64):
            assert Regions.of(regions.resized(np.asarray(ground), size)).colour_name() == name


def test_separate_parts_are_counted_without_specks():
    picture = blobs(
        (10, 10, 90, 90), (150, 20, 240, 110), (60, 150, 150, 240), (200, 200, 206, 206)
    )
    boxes = parts(Regions.of(picture).foreground)
    assert len(boxes) == 3 and all(
        abs(edge * 4 - want) < 12
        for edge, want in zip(sorted(boxes)[0], (10, 10, 90, 90), strict=True)
    )


def test_erosion_separates_touching_objects():
    image = Image.new("RGB", (256, 256), "white")
    for middle in (74, 180):  # two diamonds, which touch at a corner
        corners = [(middle - 54, 128), (middle, 74), (middle + 54, 128), (middle, 182)]
        ImageDraw.Draw(image).polygon(corners, fill=(200, 30, 30))
    areas = part_areas(np.asarray(image)).reshape(regions.EROSIONS, -1)
    assert areas[0, 0] > 0.9 and (areas[-1, :2] > 0.2).all()


@pytest.mark.parametrize(
    ("boxes", "beside"),
    [
        (((10, 70, 110, 190), (140, 90, 240, 170)), True),
        (((80, 5, 180, 115), (60, 130, 200, 250)), False),
        (((140, 20, 240, 110), (150, 140, 230, 240)), False),
    ],
)
def test_two_objects_are_split_along_the_axis_of_their_arrangement(boxes, beside):
    cut = halves(Regions.of(blobs(*boxes)).foreground)
    assert cut.beside == beside
    assert np.allclose(np.array([cut.first, cut.second]) * 4, boxes, atol=12)


def test_a_round_object_and_an_empty_picture_are_not_split():
    assert halves(Regions.of(blobs((50, 50, 200, 200))).foreground) is None
    assert halves(Regions.of(blobs()).foreground) is None


def test_a_crop_is_square_and_shows_no_background():
    picture = blobs((100, 20, 180, 240), background=COLOURS["blue"])
    cut = regions.crop(picture, Regions.of(picture).box, np.array(COLOURS["blue"], float))
    assert (
        cut.shape[0] == cut.shape[1]
        and (cut[0] == 255).all()
        and (cut[len(cut) // 2, len(cut) // 2] == (200, 30, 30)).all()
    )


# -- requests --------------------------------------------------------------------------------------


def test_the_candidates_for_a_thing_share_no_word_and_no_look():
    rows = [
        (f"{n:x}", name, "Objects", style)
        for n, name in enumerate(
            ["sail boat", "ferry", "toy boat", "key", "crown", "wolf", "poodle"]
        )
        for style in ("A", "B")
    ]
    chosen = vocabulary.choose(rows, count=3, least_styles=2)
    names = [chosen.names[thing] for thing in chosen.order]
    assert {"key", "crown"} <= set(names) and len(
        {"sail boat", "ferry", "toy boat"} & set(names)
    ) == 1 == len({"wolf", "poodle"} & set(names))
    for thing, name in chosen.names.items():
        candidates = chosen.candidates(thing)
        assert candidates[0] == thing and len(candidates) == 3
        assert name not in ("ferry", "sail boat") or not {"toy boat", "sail boat", "ferry"} & {
            chosen.names[other] for other in candidates[1:]
        }


def test_things_with_few_styles_no_plain_name_or_misjudged_styles_are_not_in_prompts():
    rows = [
        (emoji, name, group, style)
        for emoji, name, group in (
            ("a", "key", "Objects"),
            ("b", "crown", "Objects"),
            ("c", "rain", "Objects"),
            ("d", "fox", "Animals & Nature"),
            ("e", "judge", "People & Body"),
        )
        for style in "ABC"
        if (emoji, style) not in {("b", "A"), ("b", "B")}
    ]
    chosen = vocabulary.choose(rows, least_styles=3, misjudged={"d"})
    assert (
        chosen.order == ("a",)
        and set(chosen.names) == {"a", "b", "d"}
        and chosen.misjudged == {"d"}
    )


# -- learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [256, 64])
def test_unseen_real_pictures_are_judged_correctly_in_every_category(judge, cases, size):
    for category, question in (
        (PAIRS, THING),
        (PAIRS, STYLE),
        ("unseen", THING),
        (BACKGROUND, BACKGROUND_COLOUR),
        (COLOUR, OBJECT_COLOUR),
        (COUNT, OBJECT_COUNT),
        (POSITION, LAYOUT),
        (INPAINTING, THING),
    ):
        some = of(cases, category)
        assert len(some) == 12
        assert (
            right(judge, some, [regions.resized(case.picture, size) for case in some], question)
            > 0.9
        ), (category, question)


def test_degraded_pictures_are_still_recognised(judge, cases):
    draws, some = np.random.default_rng(5), of(cases, PAIRS)
    for degrade in (fitting.small_and_noisy, fitting.moved_and_blurred):
        assert right(judge, some, [degrade(case.picture, draws) for case in some], THING) > 0.9


def test_pictures_of_other_prompts_are_judged_as_wrong(judge, cases):
    """Each prompt is judged with a picture made for a prompt that asks for something else."""
    questions = {
        BACKGROUND: (BACKGROUND_COLOUR, lambda case: case.labels["background"]),
        COLOUR: (OBJECT_COLOUR, lambda case: case.labels["colour"]),
        COUNT: (OBJECT_COUNT, lambda case: case.labels["count"]),
        "seen": (THING, lambda case: case.thing),
    }
    for category, (question, label) in questions.items():
        some = of(cases, category)
        shown = [
            next(other.picture for other in some if label(other) != label(case)) for case in some
        ]
        assert right(judge, some, shown, question) == 0, category


def test_two_swapped_objects_have_the_wrong_layout(judge, cases):
    some = of(cases, POSITION)
    mirrored = [
        case.picture[:, ::-1] if case.labels["relation"].endswith(" of") else case.picture[::-1]
        for case in some
    ]
    assert right(judge, some, mirrored, LAYOUT) < 0.2


def test_noise_shows_none_of_the_requested_content(judge, cases):
    draws = np.random.default_rng(0)
    noise = [draws.integers(0, 256, (256, 256, 3)).astype(np.uint8) for _ in cases]
    verdicts = [
        (case.category, verdict)
        for case, verdict in zip(cases, judge.verdicts(cases, noise), strict=True)
    ]
    first = {
        POSITION: LAYOUT,
        COLOUR: OBJECT_COLOUR,
        COUNT: OBJECT_COUNT,
        BACKGROUND: BACKGROUND_COLOUR,
    }
    for category in CATEGORIES:
        shares = [
            verdict[first.get(category, THING)].right
            for of_, verdict in verdicts
            if of_ == category
        ]
        assert np.mean(shares) < 0.6, category  # chance level with few things and counts


def test_an_empty_hole_shows_nothing(judge, cases):
    some = of(cases, INPAINTING)
    empty = [np.where(case.hole[..., None], 255, case.picture).astype(np.uint8) for case in some]
    verdicts = judge.verdicts(some, empty)
    assert {verdict[THING].found for verdict in verdicts} == {"nothing"} and not any(
        verdict[THING].right for verdict in verdicts
    )


def test_a_style_added_later_is_distinguished_from_the_others(judge, cases):
    def line_drawing(case):
        grey = np.asarray(Image.fromarray(case.picture).convert("L"), int)
        edge = (
            np.abs(np.diff(grey, axis=0, append=255)) + np.abs(np.diff(grey, axis=1, append=255))
            > 12
        )
        return np.where(edge[..., None], 0, 255).repeat(3, -1).astype(np.uint8)

    old, new = of(cases, "seen")[:8], of(cases, PAIRS)
    others = [case.picture for case in old]
    extended = judge.with_style("outline", [line_drawing(case) for case in old], others)
    assert extended.style_of([line_drawing(case) for case in new]) == ["outline"] * len(new)
    assert "outline" not in extended.style_of([case.picture for case in new])


# -- reported accuracy -----------------------------------------------------------------------------


def test_the_judges_accuracy_on_held_out_pictures_decides_what_it_may_score(corpus, judge):
    tried = try_judge(corpus, judge, scenes=6)
    assert tried.accuracy["64"][PAIRS][THING] == {"right": 1.0, "pictures": len(drawn.PAIRS)}
    assert tried.measurable(64, COLOUR, OBJECT_COLOUR) and tried.measurable(256, "seen", STYLE)
    poor = replace(
        tried,
        accuracy={
            "256": {
                COUNT: {OBJECT_COUNT: {"right": MIN_ACCURACY[OBJECT_COUNT] - 0.01, "pictures": 100}}
            }
        },
    )
    assert (
        not poor.measurable(256, COUNT, OBJECT_COUNT)
        and not poor.measurable(64, COUNT, OBJECT_COUNT)
        and not judge.measurable(256, COUNT, OBJECT_COUNT)
    )


def test_a_saved_judge_gives_the_same_verdicts(judge, cases, tmp_path):
    path = tmp_path / "judge.safetensors"
    replace(judge, accuracy={"256": {}}).save(path)
    kept = Judge.load(path)
    kept.save(path)
    pictures = [case.picture for case in cases]
    loaded = Judge.load(path)
    assert (
        loaded.vocabulary == judge.vocabulary
        and loaded.accuracy == {"256": {}}
        and loaded.digest() == kept.digest()
    )
    found = loaded.verdicts(cases, pictures)
    assert found == kept.verdicts(cases, pictures)
    agree = [
        first == second
        for first, second in zip(found, judge.verdicts(cases, pictures), strict=True)
    ]
    assert np.mean(agree) > 0.98  # 16-bit weights from the file against 32-bit weights


def test_a_file_that_is_not_a_judge_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "judge.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(JudgeError, match="is not a judge that `glide compose` fitted"):
        Judge.load(path)


def test_a_judge_is_fitted_once_per_corpus(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "fit", lambda *given: pytest.fail("fitted again"))
    monkeypatch.setattr(fitting, "try_judge", lambda corpus, judge: judge)
    path = fitting.cached_path(corpus, tmp_path)
    other = drawn.write_corpus(tmp_path / "other")
    drawn.write_shards(other / "train", [drawn.sample("a0", style) for style in drawn.STYLES])
    assert (
        fitting.cached_path(str(other), tmp_path) != path == fitting.cached_path(corpus, tmp_path)
    )
    Judge.save(_small(), path)
    assert fitting.load_or_fit(corpus, cache=tmp_path).vocabulary == _small().vocabulary


def _small():
    from glide_ray.evaluation.heads import Discriminant, Logistic
    from glide_ray.evaluation.styles import Styles

    ones, logistic = np.ones(1, np.float32), Logistic(*(np.ones(1, np.float32) for _ in range(4)))
    lines = Discriminant(
        ("a",), ones, ones, np.ones((1, 1), np.float32), np.ones((1, 1), np.float32)
    )
    return Judge(
        vocabulary.Vocabulary({"a": "key"}, ("a",)),
        lines,
        Styles(("A",), np.zeros(1, np.int64), np.ones((1, 1), np.float32), ones, lines, logistic),
        logistic,
    )


def test_a_missing_corpus_or_one_with_a_single_style_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(
        CorpusError, match="There is no complete corpus .*nowhere/train; make it with `glide corpus"
    ):
        fitting.cached_path(str(tmp_path / "nowhere"))
    folder = drawn.write_corpus(tmp_path / "one")
    drawn.write_shards(folder / "train", [drawn.sample(thing, "Twemoji") for thing in drawn.THINGS])
    with pytest.raises(CorpusError, match="all of one style"):
        fitting.fit(str(folder))


def test_the_picture_of_a_case_is_the_flattened_picture_of_the_corpus(cases):
    case = of(cases, "seen")[0]
    assert np.array_equal(
        case.picture, np.asarray(flatten(drawn.draw_thing(case.thing, case.labels["style"])))
    )
