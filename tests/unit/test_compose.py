"""`glide compose`: prompts, pictures generated once, and shares with confidence intervals."""

import json

import numpy as np
import pytest
from helpers import drawn_things as drawn
from helpers.tiny import serving_weights

from glide_ray.cli.main import main
from glide_ray.config.sampling import SampleOptions
from glide_ray.data.images import decode, encode
from glide_ray.data.shards import Sample, write_shards
from glide_ray.evaluation import compose, fitting
from glide_ray.evaluation.cases import CorpusError, make_cases
from glide_ray.evaluation.categories import (
    BACKGROUND,
    CATEGORIES,
    COUNT,
    INPAINTING,
    KNOWN_PIXELS,
    NEW,
    PAIRS,
    POSITION,
    QUESTIONS,
    SEEN,
    STYLE,
    THING,
)
from glide_ray.evaluation.judge_accuracy import try_judge
from glide_ray.evaluation.new_style import learn_style
from glide_ray.sampling.cascade import Cascade

COUNTED = 4
FAST = SampleOptions(steps="2", upsampler_steps="1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return str(drawn.write_corpus(tmp_path_factory.mktemp("things")))


@pytest.fixture(scope="module")
def judge(corpus):
    return try_judge(corpus, fitting.fit(corpus, least_styles=2, scenes=60), scenes=6)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    return Cascade.load(
        serving_weights(tmp_path_factory.mktemp("weights"))["base"], precision="fp32"
    )


@pytest.fixture()
def run(judge, corpus, tmp_path):
    without_edits = [name for name in CATEGORIES if name != INPAINTING]
    return compose.ComposeRun(
        judge, corpus, tmp_path / "out", COUNTED, without_edits, 64, options=FAST
    )


def command(corpus, out, *more):
    return ["compose", "--corpus", corpus, "--out", str(out), "--prompts", "3", *more]


# -- prompts ---------------------------------------------------------------------------------------


def test_prompts_are_deterministic_and_no_two_share_a_seed(corpus, judge):
    cases = make_cases(corpus, judge.vocabulary, COUNTED)
    repeated = make_cases(corpus, judge.vocabulary, COUNTED)
    assert [(case.category, case.prompt, case.seed) for case in cases] == [
        (case.category, case.prompt, case.seed) for case in repeated
    ]
    assert len({case.seed for case in cases}) == len(cases) == COUNTED * len(CATEGORIES)


def test_prompts_for_held_out_pairs_use_exactly_the_held_out_pairs(corpus, judge):
    cases = make_cases(corpus, judge.vocabulary, 20)
    pairs = {
        category: {
            (case.thing, case.labels["style"]) for case in cases if case.category == category
        }
        for category in (SEEN, PAIRS)
    }
    assert pairs[PAIRS] == drawn.PAIRS and not pairs[SEEN] & drawn.PAIRS


def test_a_hole_is_a_quarter_of_the_picture_and_contains_only_the_first_object(corpus, judge):
    for case in make_cases(corpus, judge.vocabulary, 12, [INPAINTING]):
        assert case.hole.mean() == 0.25
        (left, top, right, bottom), other = case.labels["boxes"]
        assert case.hole[(top + bottom) // 2, (left + right) // 2]
        assert not case.hole[(other[1] + other[3]) // 2, (other[0] + other[2]) // 2]


# -- figures ---------------------------------------------------------------------------------------


def test_real_pictures_score_100_percent_of_real_pictures(judge, corpus, tmp_path):
    rows = compose.ComposeRun(judge, corpus, tmp_path, COUNTED, CATEGORIES, 256).score_real()
    measurable = [row for row in rows if row["measurable"]]
    assert measurable and all(
        row["right"] == row["real"] and row["share"] == 1 for row in measurable
    )
    assert {row["category"] for row in rows} == set(CATEGORIES)


def test_the_interval_of_a_share_is_wilsons_interval():
    from scipy.stats import binomtest

    for right, count in ((0, 10), (7, 10), (200, 200), (61, 200)):
        expected = binomtest(right, count).proportion_ci(0.95, "wilson")
        assert compose.wilson(right, count) == pytest.approx(
            (expected.low, expected.high), abs=1e-6
        )


def test_a_share_of_real_pictures_is_paired_by_prompt():
    """If the model is right for the same prompts as the real pictures, its share is exactly 1."""
    real = np.array([1.0] * 30 + [0.0] * 10)
    assert compose.share_of_real(real, real) == (1, 1, 1)
    share, low, high = compose.share_of_real(np.where(np.arange(40) % 2, real, 0), real)
    assert low < share == 0.5 < high


def test_questions_that_the_judge_cannot_measure_have_no_figure(judge, corpus, tmp_path):
    from dataclasses import replace

    blind = replace(judge, accuracy={"64": {SEEN: {STYLE: {"right": 0.9, "pictures": 200}}}})
    rows = compose.ComposeRun(blind, corpus, tmp_path, COUNTED, [SEEN], 64).score_real()
    style = next(row for row in rows if row["question"] == STYLE)
    assert not style["measurable"] and "right" not in style
    assert ["not measurable", "", "", "", ""] in [row[2:] for row in compose.table(rows)]


# -- pictures --------------------------------------------------------------------------------------


def test_pictures_are_generated_once_then_judged_and_shown_on_a_page(run, cascade):
    done = []
    rows = run.score_models(cascade, progress=lambda *progress: done.append(progress))
    total = COUNTED * len(run.categories)
    assert done[-1] == (total, total)
    assert {row["category"] for row in rows} == set(run.categories)
    figures = json.loads((run.out / compose.FIGURES).read_text())
    assert len(figures["pictures"]) == total and figures["options"]["steps"] == "2"
    questions = {picture["category"]: set(picture["verdicts"]) for picture in figures["pictures"]}
    assert questions == {category: set(QUESTIONS[category]) for category in run.categories}
    page = (run.out / compose.PAGE).read_text()
    assert all(picture["prompt"] in page for picture in figures["pictures"])
    generated_again = []
    assert (
        run.score_models(cascade, progress=lambda *progress: generated_again.append(progress))
        == rows
        and not generated_again
    )


def test_an_interrupted_run_generates_the_missing_pictures_and_gives_the_same_figures(run, cascade):
    rows = run.score_models(cascade)
    pictures = sorted((run.out / compose.PICTURES).glob("*.png"))
    kept = {path: path.stat().st_mtime_ns for path in pictures[1:]}
    before = pictures[0].read_bytes()
    pictures[0].unlink()
    pictures[1].write_bytes(b"cut off")
    done = []
    assert run.score_models(cascade, progress=lambda *progress: done.append(progress)) == rows
    assert pictures[0].read_bytes() == before
    assert {path for path in kept if path.stat().st_mtime_ns != kept[path]} == {pictures[1]}


def test_pictures_with_other_steps_are_generated_again(run, cascade):
    from dataclasses import replace

    cases = make_cases(run.corpus, run.judge.vocabulary, 2, [COUNT])
    first = compose.make_pictures(cascade, cases, run.out, FAST)
    other = compose.make_pictures(cascade, cases, run.out, replace_steps(FAST, "3"))
    assert not np.array_equal(first, other)
    assert replace(run, seed=5)._cases()[0].seed == run._cases()[0].seed + 5


def replace_steps(options, steps):
    return options.model_copy(update={"steps": steps})


def test_a_model_without_inpainting_skips_the_inpainting_category(judge, corpus, cascade, tmp_path):
    run = compose.ComposeRun(judge, corpus, tmp_path, 2, [INPAINTING], 64, options=FAST)
    with pytest.raises(compose.ComposeError, match="--categories"):
        run.score_models(cascade)
    assert not (tmp_path / compose.PICTURES).exists()


def test_an_edit_keeps_known_pixels_and_a_changed_pixel_is_reported(judge, corpus, tmp_path):
    cases = make_cases(corpus, judge.vocabulary, 2, [INPAINTING])
    kept = [compose.real_picture(case, 64) for case in cases]
    changed = [picture.copy() for picture in kept]
    for case, picture in zip(cases, changed, strict=True):
        y, x = np.argwhere(~case.hole)[0] // 4
        picture[y, x] ^= 1
    assert [
        verdicts[KNOWN_PIXELS].right for verdicts in compose.judge_pictures(judge, cases, kept)
    ] == [
        True,
        True,
    ]
    assert [
        verdicts[KNOWN_PIXELS].right for verdicts in compose.judge_pictures(judge, cases, changed)
    ] == [
        False,
        False,
    ]


# -- a new style -----------------------------------------------------------------------------------


def write_line_drawings(folder):
    """Write a corpus of one style, the things as black lines on white; returns its folder."""
    samples = []
    for thing in drawn.THINGS:
        original = drawn.sample(thing, "3D render")
        grey = np.asarray(decode(original.image).convert("L"), int)
        edge = np.abs(np.diff(grey, axis=0, append=255)) + np.abs(np.diff(grey, axis=1, append=255))
        pixels = np.where(edge[..., None] > 12, 0, 255).repeat(3, -1).astype(np.uint8)
        name = drawn.THINGS[thing]
        samples.append(
            Sample(
                f"outline-{name}",
                encode(pixels),
                "png",
                (f"a {name}, outline",),
                {**original.meta, "style": "outline"},
            )
        )
    write_shards(folder / "train", samples)
    return str(folder)


def test_a_new_style_is_learnt_from_half_of_its_things_and_scored_on_the_others(
    judge, corpus, tmp_path
):
    extended, rows = learn_style(judge, write_line_drawings(tmp_path / "outline"), corpus)
    assert 0 < len(rows) < len(drawn.THINGS) and {row.style for row in rows} == {"outline"}
    accuracy = extended.accuracy["64"][NEW][STYLE]
    assert accuracy["right"] == 1 and accuracy["pictures"] == len(rows) + min(
        len(rows), len(drawn.PAIRS)
    )
    assert extended.accuracy["64"][SEEN] == judge.accuracy["64"][SEEN]
    run = compose.ComposeRun(extended, corpus, tmp_path / "out", 3, [SEEN], 64, new_style=rows)
    figures = {(row["category"], row["question"]): row for row in run.score_real()}
    assert figures[NEW, STYLE]["right"] == 1 and figures[NEW, STYLE]["pictures"] == 3
    assert extended.digest() != judge.digest()


def test_a_corpus_with_several_styles_is_refused_as_a_new_style(judge, corpus):
    with pytest.raises(CorpusError, match="give --new-style a corpus of one style"):
        learn_style(judge, corpus, corpus)


# -- command ---------------------------------------------------------------------------------------


def test_one_command_scores_the_shipped_weights(corpus, judge, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "load_or_fit", lambda corpus: judge)
    main(
        command(
            corpus,
            tmp_path / "out",
            "--size",
            "64",
            "--steps",
            "2",
            "--categories",
            SEEN,
            POSITION,
            INPAINTING,
        )
    )
    printed = capsys.readouterr().out
    assert (
        "things in styles seen in training: object" in printed
        and "inpainting: known pixels equal" in printed
    )
    figures = json.loads((tmp_path / "out" / compose.FIGURES).read_text())
    known = next(line for line in figures["lines"] if line["question"] == KNOWN_PIXELS)
    assert known["right"] == 1 and known["reached"]
    assert {THING, STYLE} <= set(figures["pictures"][0]["verdicts"])


def test_real_pictures_alone_are_judged_without_a_model(
    corpus, judge, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(fitting, "load_or_fit", lambda corpus: judge)
    main(command(corpus, tmp_path / "out", "--real", "--categories", BACKGROUND))
    assert "background's colour" in capsys.readouterr().out
    assert not (tmp_path / "out" / compose.PICTURES).exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--categories", "colours"], "colours"),
        (["--prompts", "0"], "--prompts"),
        (["--steps", "0", "--size", "64"], "Steps"),
        (["--base", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--corpus", "nowhere", "--real"], "glide corpus"),
    ],
)
def test_invalid_input_is_refused_in_one_sentence(corpus, tmp_path, capsys, more, says):
    try:
        code = main(command(corpus, tmp_path / "out", *more))
    except SystemExit as ended:  # raised by argparse
        code = ended.code
    error = capsys.readouterr().err
    assert code and says in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
