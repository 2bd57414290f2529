"""Near-copies of training images, in a reference set and among generated pictures.

Copies must be found, and other pictures must not be reported.
"""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics.pairwise import cosine_distances

from glide_ray.cli.main import main
from glide_ray.data.images import centre_crop, decode, encode
from glide_ray.data.shards import Sample, write_shards
from glide_ray.distributed.evaluation.near_copies import left_out
from glide_ray.evaluation.neighbours import nearest, nearest_with_caption, same_picture


@pytest.fixture
def draws():
    return np.random.default_rng(0)


def pictures(count, seed, size=64):
    """Smooth random patterns, all different."""
    draws = np.random.default_rng(seed)
    for n in range(count):
        rough = Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        yield Sample(
            f"{n:03d}",
            encode(np.asarray(rough.resize((size, size), Image.Resampling.BICUBIC))),
            "png",
            (f"pattern {seed}-{n}",),
            {},
        )


def copied(sample, size=56):
    """The same picture at another size, as a JPEG."""
    image = decode(sample.image).resize((size, size), Image.Resampling.BICUBIC)
    return Sample(
        f"copy-{sample.key}", encode(np.asarray(image), "jpeg"), "jpg", sample.captions, {}
    )


def test_the_nearest_original_agrees_with_all_pairwise_distances(draws):
    images, originals = (
        draws.normal(size=(70, 24)).astype(np.float32),
        draws.normal(size=(300, 24)).astype(np.float32),
    )
    found, all_of_them = nearest(images, originals), cosine_distances(images, originals)
    assert (found.rows == all_of_them.argmin(1)).all() and found.distances == pytest.approx(
        all_of_them.min(1), abs=1e-6
    )


def test_the_original_of_a_prompt_is_the_nearest_image_with_that_caption(draws):
    originals = draws.normal(size=(5, 8)).astype(np.float32)
    found = nearest_with_caption(
        originals[[1, 4, 0]] + 1e-3, ["a", "b", "none"], originals, ["a", "a", "a", "b", "b"]
    )
    assert (
        found.rows.tolist() == [1, 4, -1]
        and np.isnan(found.distances[2])
        and found.distances[:2] == pytest.approx(0, abs=1e-5)
    )


def test_a_resized_and_compressed_picture_is_the_same_picture_and_another_is_not():
    picture, another = (decode(sample.image) for sample in pictures(2, 0))
    assert same_picture(picture, decode(copied(next(pictures(1, 0))).image)) and not same_picture(
        picture, another
    )


@pytest.mark.usefixtures("ray_session")
def test_near_copies_of_training_images_are_listed_and_can_be_left_out_in_any_folder(
    tiny_weights, tmp_path, capsys, monkeypatch
):
    clip, train, own = str(tiny_weights["clip"]), list(pictures(20, 1)), list(pictures(12, 2))
    write_shards(tmp_path / "train", train)
    write_shards(tmp_path / "reference", [*own, *map(copied, train[:5])])
    write_shards(tmp_path / "made", pictures(9, 3))
    monkeypatch.chdir(tmp_path)
    places = ["reference", "--training", str(tmp_path / "train"), "--clip", clip]
    assert (
        main(["filter-reference", *places, "--out", str(tmp_path / "out"), "--distance", "0.0005"])
        == 0
    )
    listed = left_out(str(tmp_path / "out" / "left-out.json"))
    assert [int(name.rpartition("#")[2]) for name in listed] == [
        12,
        13,
        14,
        15,
        16,
    ] and "5 of 17 images" in capsys.readouterr().out
    assert "pattern 1-3" in (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert (
        main(
            [
                "evaluate",
                str(tmp_path / "made"),
                "--reference",
                "../reference",
                "--clip",
                clip,
                "--out",
                str(tmp_path / "evaluation"),
                "--leave-out",
                str(tmp_path / "out" / "left-out.json"),
            ]
        )
        == 0
    )
    assert (
        json.loads((tmp_path / "evaluation" / "figures.json").read_text())["reference"][
            "filtered_images"
        ]
        == 12
    )
    monkeypatch.chdir(tmp_path)
    for name, text in (("bad", "[]"), ("worse", '{"names": [12]}')):
        (tmp_path / f"{name}.json").write_text(text)
    for wrong, sentence in (
        (["filter-reference", *places, "--distance", "3"], "--distance is a cosine distance"),
        *(
            (
                ["evaluate", "x", "--clip", clip, "--leave-out", f"{name}.json"],
                "is not a list as `glide filter-reference`",
            )
            for name in ("bad", "worse")
        ),
    ):
        assert main(wrong) == 2 and sentence in capsys.readouterr().err


@pytest.mark.usefixtures("ray_session")
def test_only_a_model_that_repeats_training_images_is_flagged(tiny_weights, tmp_path):
    train = list(pictures(20, 1))
    write_shards(tmp_path / "train", train)
    write_shards(tmp_path / "held_out", pictures(20, 2))
    write_shards(tmp_path / "parrot", [copied(sample, 48) for sample in train])
    write_shards(
        tmp_path / "honest",
        [
            Sample(n.key, n.image, "png", t.captions, {})
            for n, t in zip(pictures(20, 3), train, strict=True)
        ],
    )
    found = {}
    for name in ("parrot", "honest"):
        for _ in range(2):  # the second time from stored features, with identical figures
            assert (
                main(
                    [
                        "regurgitation",
                        str(tmp_path / name),
                        "--training",
                        str(tmp_path / "train"),
                        "--held-out",
                        str(tmp_path / "held_out"),
                        "--clip",
                        str(tiny_weights["clip"]),
                        "--out",
                        str(tmp_path / "out"),
                    ]
                )
                == 0
            )
            figures = json.loads((tmp_path / "out" / "figures.json").read_text())
            assert found.setdefault(name, figures) == figures
    assert found["parrot"]["copies_by_pixels"] == 20 and found["honest"]["copies_by_pixels"] == 0
    assert (
        found["parrot"]["nearer_than_1_percent_of_held_out"]
        > 0.9
        > 0.3
        > found["honest"]["nearer_than_1_percent_of_held_out"]
    )
    assert (
        found["parrot"]["own_originals"] == 20
        and found["parrot"]["own_median"] < found["honest"]["own_median"]
    )
    assert Image.open(tmp_path / "out" / "closest.png").width > 800


@pytest.mark.usefixtures("ray_session")
def test_the_training_crop_of_a_wide_image_is_recognised_by_its_pixels(tiny_weights, tmp_path):
    wide = [
        Sample(
            sample.key,
            encode(np.asarray(decode(sample.image).resize((160, 64)))),
            "png",
            (f" {sample.captions[0]}\u2028",),
            {},
        )
        for sample in pictures(6, 1, 160)
    ]
    write_shards(tmp_path / "train", wide)
    write_shards(tmp_path / "held_out", pictures(6, 2))
    write_shards(
        tmp_path / "parrot",
        [
            Sample(
                sample.key,
                encode(centre_crop(decode(sample.image), 64)),
                "png",
                sample.captions,
                {},
            )
            for sample in wide
        ],
    )
    arguments = [
        "--training",
        str(tmp_path / "train"),
        "--held-out",
        str(tmp_path / "held_out"),
        "--clip",
        str(tiny_weights["clip"]),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["regurgitation", str(tmp_path / "parrot"), *arguments]) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["copies_by_pixels"] == figures["own_originals"] == 6


@pytest.mark.usefixtures("ray_session")
def test_if_no_pictures_are_given_they_are_generated_from_training_prompts(
    tiny_weights, drawn_corpus, tmp_path
):
    arguments = [
        "regurgitation",
        "--training",
        str(drawn_corpus / "train"),
        "--held-out",
        str(drawn_corpus / "held_out"),
        "--clip",
        str(tiny_weights["clip"]),
        "--base",
        str(tiny_weights["base"]),
        "--images",
        "6",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["pictures"] == figures["own_originals"] == 6 and figures["training"] == 96
