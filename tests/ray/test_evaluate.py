"""Evaluation of generated pictures: reproducible and correct figures, and guidance sweeps."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.processes import without_ray
from PIL import Image

from glide_ray.cli.main import main
from glide_ray.data.images import decode, encode
from glide_ray.data.shards import Sample, write_shards
from glide_ray.data.sources import find_parts, read_part
from glide_ray.distributed.evaluation.evaluate import FIGURES, REFERENCE, Judges, evaluate
from glide_ray.errors import UserError
from glide_ray.evaluation import metrics
from glide_ray.evaluation.features import CLASSES, POOLED, InceptionFeatures, Squares
from glide_ray.evaluation.image_features import Reference
from glide_ray.evaluation.metrics import MetricError, Moments
from glide_ray.evaluation.report import Point, _lines, fronts

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def clip(tiny_weights):
    return str(tiny_weights["clip"])


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    # In a process of its own: TorchScript reads torch's functions, which DeepSpeed replaces.
    command = [sys.executable, "-m", "helpers.published_inception", str(path)]
    subprocess.run(command, cwd=ROOT / "tests", check=True)
    return str(path)


def distinct(count, size=24, seed=0):
    """Pictures of noise, all different.

    Duplicates have a nearest-neighbour distance of 0, so no other picture would count as near.
    """
    draws = np.random.default_rng(seed)
    return [
        Sample(
            f"{n:03d}",
            encode(draws.integers(0, 256, (size, size, 3), dtype=np.uint8)),
            "png",
            (f"noise {n}",),
            {},
        )
        for n in range(count)
    ]


def test_a_corpus_has_distance_zero_to_itself_and_replaced_pictures_are_noticed(
    drawn_corpus, clip, tmp_path
):
    write_shards(tmp_path / "made", distinct(20))
    found = evaluate(
        {"same": str(tmp_path / "made")},
        str(tmp_path / "made"),
        str(tmp_path / "out"),
        Judges(clip),
    )
    figures = found["sets"]["same"]
    assert (
        figures["frechet_distance"] < 1e-3
        and figures["precision"] == figures["recall"] == 1
        and figures["cmmd"] == pytest.approx(0, abs=1e-6)
    )
    assert (
        figures["clip_score"] == found["reference"]["clip_score"]
        and figures["pictures"] == 20
        and found["size"] == 24
    )
    assert "noise 7" in (tmp_path / "out" / "report.html").read_text()
    write_shards(tmp_path / "made", distinct(30))
    after = evaluate(
        {"same": str(tmp_path / "made")},
        str(drawn_corpus / "held_out"),
        str(tmp_path / "out"),
        Judges(clip),
    )
    assert (after["sets"]["same"]["pictures"], after["reference"]["images"]) == (30, 16) and after[
        "sets"
    ]["same"]["frechet_distance"] > 0


@pytest.fixture
def messages(caplog):
    """A function that returns the messages logged since its last call."""
    caplog.set_level("INFO", "glide_ray")

    def latest():
        found = [
            record.getMessage() for record in caplog.records if record.name.startswith("glide_ray")
        ]
        caplog.clear()
        return found

    return latest


def test_a_rerun_gives_identical_figures_and_embeds_only_new_pictures(
    drawn_corpus, clip, tmp_path, s3, messages
):
    train, held_out = (str(drawn_corpus / part) for part in ("train", "held_out"))

    def again(out):
        return evaluate({"made": train}, held_out, out, Judges(clip))

    first = again(str(tmp_path / "a"))
    assert again(f"{s3}/evaluated") == first  # computed again in another folder
    messages()
    assert again(str(tmp_path / "a")) == first and not messages()
    (tmp_path / "a" / FIGURES).unlink()  # as after a kill before the end
    (tmp_path / "a" / REFERENCE).write_bytes(b"half")
    (tmp_path / "a" / "features" / "reference-clip.parquet").write_bytes(b"half")
    assert again(str(tmp_path / "a")) == first
    assert messages() == [f"embedding {held_out}"]
    assert json.loads((tmp_path / "a" / FIGURES).read_text()) == first


def test_pictures_replaced_under_the_same_names_are_embedded_again(drawn_corpus, clip, tmp_path):
    def bulk(seed):
        for sample in distinct(8, seed=seed):
            (tmp_path / "made").mkdir(exist_ok=True)
            (tmp_path / "made" / f"{sample.key}.png").write_bytes(sample.image)
            (tmp_path / "made" / f"{sample.key}.txt").write_text(sample.captions[0])

    def figures():
        return evaluate(
            {"made": str(tmp_path / "made")},
            str(drawn_corpus / "held_out"),
            str(tmp_path / "out"),
            Judges(clip),
        )["sets"]["made"]

    bulk(0)
    first = figures()
    bulk(1)
    assert figures()["frechet_distance"] != first["frechet_distance"]
    bulk(0)
    assert figures() == first


def test_unreadable_pictures_are_reported_at_each_run_and_retried(
    drawn_corpus, clip, tmp_path, messages
):
    write_shards(tmp_path / "real", distinct(20), per_shard=10)
    shard = next((tmp_path / "real").glob("*1.tar"))

    def images():
        messages()
        return evaluate(
            {"made": str(drawn_corpus / "held_out")},
            str(tmp_path / "real"),
            str(tmp_path / "out"),
            Judges(clip),
        )["reference"]["images"]

    shard.rename(tmp_path / "away")
    for _ in range(2):
        assert images() == 10 and any(shard.name in line for line in messages())
    (tmp_path / "away").rename(shard)
    assert images() == 20 and images() == 20 and not messages()


def test_features_of_different_pictures_by_the_two_networks_are_refused(
    drawn_corpus, clip, inception, tmp_path, monkeypatch
):
    from glide_ray.distributed.evaluation import evaluate as module

    embed_corpus = module.embed_corpus

    def drop_first(source, path, *rest):
        embedded = embed_corpus(source, path, *rest)
        return (
            replace(embedded, names=embedded.names[1:], features=embedded.features[1:])
            if path == inception
            else embedded
        )

    monkeypatch.setattr(module, "embed_corpus", drop_first)
    with pytest.raises(
        UserError, match="16 by clip and 15 by inception.; run the same command again"
    ):
        evaluate(
            {"made": str(drawn_corpus / "held_out")},
            str(drawn_corpus / "held_out"),
            str(tmp_path / "out"),
            Judges(clip, inception),
        )


def test_pictures_without_captions_have_all_figures_except_the_clip_score(
    drawn_corpus, clip, tmp_path, capsys, messages
):
    (tmp_path / "bare").mkdir()
    for sample in distinct(12, 64):
        (tmp_path / "bare" / f"{sample.key}.png").write_bytes(sample.image)
    found = evaluate(
        {"bare": str(tmp_path / "bare")},
        str(drawn_corpus / "held_out"),
        str(tmp_path / "out"),
        Judges(clip),
    )
    assert (
        found["sets"]["bare"]["clip_score"] is None
        and found["sets"]["bare"]["inception_score"] >= 1
        and "bare: 12 of 12 pictures have no caption, and are left out of the CLIP score"
        in messages()
    )
    (tmp_path / "bare" / "000.txt").write_text("noise")
    mixed = evaluate(
        {"bare": str(tmp_path / "bare")},
        str(drawn_corpus / "held_out"),
        str(tmp_path / "out"),
        Judges(clip),
    )["sets"]["bare"]
    assert (
        mixed["clip_score"] is not None and {**mixed, "clip_score": None} == found["sets"]["bare"]
    )
    assert (
        main(
            [
                "evaluate",
                str(drawn_corpus / "held_out"),
                "--reference",
                str(tmp_path / "bare"),
                "--clip",
                clip,
                "--out",
                str(tmp_path / "other"),
            ]
        )
        == 0
    )
    (tmp_path / "bare" / "000.txt").unlink()
    reverse = evaluate(
        {"drawn": str(drawn_corpus / "held_out")},
        str(tmp_path / "bare"),
        str(tmp_path / "other"),
        Judges(clip),
    )
    assert (
        reverse["reference"]["clip_score"] is reverse["sets"]["drawn"]["inception_score"] is None
        and reverse["sets"]["drawn"]["clip_score"] is not None
    )
    assert "they have no captions" in (tmp_path / "other" / "report.html").read_text()
    (tmp_path / "bare" / "job.json").write_text("{}")
    with pytest.raises(UserError, match="bare is unfinished"):
        evaluate(
            {"bare": str(tmp_path / "bare")},
            str(drawn_corpus / "held_out"),
            str(tmp_path / "out"),
            Judges(clip),
        )


@pytest.mark.slow
def test_a_sweep_killed_at_a_random_point_and_resubmitted_gives_the_same_figures(
    drawn_corpus, tiny_weights, tmp_path
):
    """The killed process starts its own Ray cluster."""
    environment = without_ray()

    def arguments(out):
        return [
            "--reference",
            str(drawn_corpus / "held_out"),
            "--base",
            str(tiny_weights["base"]),
            "--clip",
            str(tiny_weights["clip"]),
            "--noised-clip",
            str(tiny_weights["clip"]),
            "--images",
            "24",
            "--steps",
            "4",
            "--guidance-scale",
            "1",
            "--clip-scale",
            "1",
            "--out",
            str(tmp_path / out),
        ]

    assert main(["evaluate", *arguments("whole")]) == 0
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "jobs", "evaluate.py"), *arguments("killed")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 180
    while not (tmp_path / "killed" / "pictures").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(seconds := random.uniform(0, 15))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    print(f"killed {seconds:.1f} s after pictures were begun")
    assert main(["evaluate", *arguments("killed")]) == 0
    whole, killed = (
        json.loads((tmp_path / out / FIGURES).read_text()) for out in ("whole", "killed")
    )
    assert killed == whole and set(killed["sets"]) == {"unguided", "clip-1"}
    assert (tmp_path / "killed" / "fronts.png").read_bytes() == (
        tmp_path / "whole" / "fronts.png"
    ).read_bytes()


def test_saved_statistics_can_replace_the_reference_but_not_with_another_network(
    drawn_corpus, clip, inception, tmp_path
):
    write_shards(tmp_path / "made", distinct(20, 64))
    sets, first = {"made": str(tmp_path / "made")}, str(tmp_path / "first")
    from_corpus = evaluate(sets, str(drawn_corpus / "held_out"), first, Judges(clip))
    from_statistics = evaluate(sets, f"{first}/{REFERENCE}", str(tmp_path / "second"), Judges(clip))
    assert (
        from_statistics["sets"] == from_corpus["sets"]
        and from_statistics["reference"]["images"] == 16
    )
    with pytest.raises(MetricError, match=f"{REFERENCE} was measured with other judges"):
        evaluate(sets, f"{first}/{REFERENCE}", str(tmp_path / "third"), Judges(clip, inception))
    with pytest.raises(MetricError, match=f"{REFERENCE} was measured with other size .64"):
        evaluate(sets, f"{first}/{REFERENCE}", str(tmp_path / "third"), Judges(clip), size=32)
    with pytest.raises(MetricError, match="does not hold the statistics of a reference"):
        Reference.load(clip)


def test_with_inception_distances_and_scores_use_its_features(
    drawn_corpus, clip, inception, tmp_path
):
    write_shards(tmp_path / "made", distinct(20, 64))
    found = evaluate(
        {"made": str(tmp_path / "made")},
        str(drawn_corpus / "train"),
        str(tmp_path / "out"),
        Judges(clip, inception),
    )
    network = InceptionFeatures(inception)
    features = {}
    for name, samples in (("made", distinct(20, 64)), ("real", None)):
        samples = samples or [
            sample for part in find_parts(drawn_corpus / "train") for sample in read_part(part)
        ]
        features[name] = network.images([decode(sample.image) for sample in samples])
    assert features["made"].shape == (20, POOLED + CLASSES) and found["inception"]
    expected = metrics.frechet_distance(
        *(Moments.of(features[name][:, :POOLED]) for name in ("made", "real"))
    )
    assert found["sets"]["made"]["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    assert found["sets"]["made"]["inception_score"] == pytest.approx(
        metrics.inception_score(features["made"][:, POOLED:])[0], rel=1e-5
    )
    assert "Distances are FID and the score is IS" in (tmp_path / "out" / "report.html").read_text()


def test_leaving_images_out_of_the_reference_changes_only_the_filtered_distance(
    drawn_corpus, clip, tmp_path
):
    write_shards(tmp_path / "made", distinct(20, 64))
    plain = evaluate(
        {"made": str(tmp_path / "made")},
        str(drawn_corpus / "train"),
        str(tmp_path / "out"),
        Judges(clip),
    )["sets"]["made"]
    names = [
        name
        for name in Reference.load(str(tmp_path / "out" / REFERENCE))[0].names
        if name.endswith(("1", "2", "3", "4"))
    ]
    found = evaluate(
        {"made": str(tmp_path / "made")},
        str(drawn_corpus / "train"),
        str(tmp_path / "out"),
        Judges(clip),
        names,
    )
    assert found["reference"]["filtered_images"] == 96 - len(names)
    filtered = found["sets"]["made"]
    assert {name: filtered[name] for name in plain} == plain and filtered[
        "filtered_frechet_distance"
    ] != plain["frechet_distance"]
    # An empty list of images to leave out.
    nothing = evaluate(
        {"made": str(tmp_path / "made")},
        str(drawn_corpus / "train"),
        str(tmp_path / "out"),
        Judges(clip),
        [],
    )
    assert nothing["sets"]["made"]["filtered_frechet_distance"] == pytest.approx(
        plain["frechet_distance"]
    )
    with pytest.raises(MetricError, match="names other.tar#1, which is not among"):
        evaluate(
            {"made": str(tmp_path / "made")},
            str(drawn_corpus / "train"),
            str(tmp_path / "out"),
            Judges(clip),
            ["other.tar#1"],
        )


def test_networks_see_centred_squares_no_larger_than_the_compared_pictures():
    class Sizes:
        width = 2

        def images(self, pictures):
            return np.array([[*picture.size] for picture in pictures], np.float32)

    wide = Image.new("RGB", (90, 60), "white")
    wide.paste("red", (0, 0, 15, 60))  # outside the centred square
    assert Squares(Sizes(), 32).images([wide, Image.new("RGB", (20, 30))]).tolist() == [
        [32, 32],
        [20, 20],
    ]

    class Colours(Sizes):
        def images(self, pictures):
            return np.array(
                [np.asarray(picture).min((0, 1))[:2] for picture in pictures], np.float32
            )

    assert Squares(Colours(), 32).images([wide]).tolist() == [[255, 255]]


def test_fronts_have_a_line_per_model_and_kind_of_guidance_from_the_unguided_set():
    def point(name, **known):
        return Point(
            name,
            {
                "inception_score": 1.5,
                "frechet_distance": 2.0,
                "precision": 0.5,
                "recall": 0.4,
                "clip_score": 20.0,
                **known,
            },
        )

    both = fronts(
        [
            point("unguided", guidance_scale=1.0, clip_scale=0.0),
            point("g", guidance_scale=2.0, frechet_distance=3.0),
            point("c", guidance_scale=1.0, clip_scale=1.0, frechet_distance=1.0),
            point("another"),
        ],
        inception=True,
    )
    assert both.ndim == 3 and both.shape[1] == 3 * 500
    assert fronts([point("another")], inception=False).shape == both.shape
    guided = [
        point("unguided", guidance_scale=1.0, model="a"),
        point("g", guidance_scale=3.0, model="a"),
        point("h", guidance_scale=2.0, model="a"),
        point("c", guidance_scale=1.0, clip_scale=1.0, model="a"),
        point("other", guidance_scale=1.0, model="b"),
        point("another"),
    ]
    assert {kind: [point.name for point in line] for kind, line in _lines(guided).items()} == {
        "CLIP guidance, a": ["unguided", "c"],
        "classifier-free guidance, a": ["unguided", "h", "g"],
        "classifier-free guidance, b": ["other"],
    }


def test_bad_input_is_refused_in_one_sentence_before_any_work(
    drawn_corpus, tiny_weights, tmp_path, capsys
):
    base, clip = str(tiny_weights["base"]), str(tiny_weights["clip"])
    common = ["--reference", str(drawn_corpus / "held_out"), "--out", str(tmp_path / "out")]
    for arguments, sentence in (
        (["a=x", "b/a", *common], "Two sets of pictures are called a"),
        ([str(tmp_path / "none"), "--clip", clip, *common], "There is no corpus"),
        (
            ["--base", base, "--clip", str(tmp_path / "no.safetensors"), *common],
            "There is no weights file",
        ),
        (
            ["--base", base, "--clip", clip, "--inception", str(tmp_path / "no.pt"), *common],
            "There is no Inception network",
        ),
        (
            ["--base", base, "--clip", clip, "--clip-scale", "1", *common],
            "give one with --noised-clip",
        ),
        (
            ["--base", base, "--clip", clip, "--guidance-scale", "-1", "--images", "4", *common],
            "guidance_scale",
        ),
        (
            ["--base", base, "--clip", clip, "--leave-out", str(tmp_path / "no.json"), *common],
            "no.json",
        ),
    ):
        assert main(["evaluate", *arguments]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error
    assert not (tmp_path / "out" / "pictures").exists()
    (tmp_path / "not.pt").write_bytes(b"no program")
    with pytest.raises(UserError, match="is not a TorchScript file"):
        InceptionFeatures(tmp_path / "not.pt")
