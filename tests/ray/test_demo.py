"""`make demo` on a small scale: random weights in place of the shipped ones, few pictures."""

import base64
import io
import json
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers.tiny import random_model, tiny
from PIL import Image

from glide_ray.cli.main import main
from glide_ray.config import presets
from glide_ray.config.sampling import SampleOptions
from glide_ray.data.images import encode
from glide_ray.data.packages import EmojiError, fetch_packages
from glide_ray.data.sets import KEYWORDS, NAMES
from glide_ray.data.shards import read_shard
from glide_ray.data.splits import is_held_out
from glide_ray.data.styles import STYLES
from glide_ray.errors import UserError
from glide_ray.evaluation.report import HOLE, contact_sheet, loss_curves, show_hole, stairs
from glide_ray.experiments.demo.asking import Client, left_part, mask_png
from glide_ray.experiments.demo.figures import DRAWINGS, draw_sketch
from glide_ray.experiments.demo.page import MAX_BYTES, PICTURES, copy_pictures
from glide_ray.experiments.demo.plan import STYLE, Plan, Sketch
from glide_ray.experiments.demo.results import Results
from glide_ray.experiments.demo.run import run
from glide_ray.experiments.demo.tuning import tuning_preset
from glide_ray.models.weights import load_config, load_metadata
from glide_ray.pretrained import shipped
from glide_ray.pretrained.card import Source, sources_in
from glide_ray.sampling.recipe import read_recipe
from glide_ray.train import pack as packing

FEW = SampleOptions(steps=2, upsampler_steps=2)
SMALL = Plan(
    things=("a fox", "a house"),
    styles=("Noto", "blob"),
    sheet_options=FEW,
    settings=(
        *Plan().settings,
        "steps=4",
        "batch=8",
        "held_out_images=4",
        "evaluate_every=4",
        "checkpoint_every=2",
        "log_every=1",
    ),
    options=FEW,
    pairs=("a fox, outline", "a house, outline"),
    sketches=(
        Sketch("mushroom", (("a mushroom, Noto", 0.5, False), ("a mushroom, outline", 0.9, True))),
    ),
    scene=("a fox to the left of a house, Noto", "a house to the left of a crab, Noto"),
)


# -- pictures ------------------------------------------------------------------------------------


def test_a_contact_sheet_shows_every_image_in_its_place():
    colours = [np.full((32, 32, 3), value, np.uint8) for value in (10, 90, 170, 250, 40)]
    labels = ["one", "two", "three", "four", "a very long label that has to be wrapped"]
    sheet = np.asarray(contact_sheet(colours, labels, columns=3, size=64))
    assert sheet[12 + 32, 12 + 32].tolist() == [10] * 3
    assert sheet[12 + 32, 12 + 76 + 32].tolist() == [90] * 3
    assert (sheet == 40).all(axis=2).sum() >= 64 * 64


def test_a_picture_that_grows_is_shown_at_one_height():
    images = [np.full((32, width, 3), value, np.uint8) for width, value in ((32, 10), (48, 90))]
    sheet = np.asarray(stairs(images, ["first", "then"], height=64))
    assert [(sheet == value).all(axis=2).sum() for value in (10, 90)] == [64 * 64, 64 * 96]


def test_the_hole_of_an_edit_is_shown_in_green():
    known = np.ones((4, 4), bool)
    known[1, 1] = False
    shown = show_hole(np.full((4, 4, 3), 9, np.uint8), known)
    assert shown[1, 1].tolist() == list(HOLE) and (shown == 9).all(axis=2).sum() == 15


@pytest.mark.parametrize("last", [1 / 8, 0.9])
def test_loss_curves_are_drawn_to_a_picture(tmp_path, last):
    metrics = [
        {"step": 0, "held_out": 1.0},
        {"step": 1, "loss": 1.0},
        {"step": 8, "loss": last},
        {"step": 8, "held_out": last},
    ]
    loss_curves({"base": metrics, "upsampler": metrics}, tmp_path / "deep" / "loss.png")
    assert Image.open(tmp_path / "deep" / "loss.png").size[0] > 800
    assert len(list((tmp_path / "deep").iterdir())) == 1


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_sketch_stands_on_white_and_fills_a_good_part_of_it(name):
    drawing = draw_sketch(name)
    white = (drawing == 255).all(axis=2)
    assert drawing.shape == (256, 256, 3) and white[:8].all() and 0.2 < (~white).mean() < 0.8


# -- results -------------------------------------------------------------------------------------


def test_a_stage_is_made_again_only_where_what_it_depends_on_changes(tmp_path):
    results, made = Results(tmp_path), []

    def make():
        made.append(1)
        (tmp_path / "picture.png").write_bytes(b"x")
        return {"number": len(made), "files": ["picture.png"]}

    key = {"weights": "a", "things": ("fox", "house")}
    assert results.read("sheet") is None
    assert [results.cached_result("sheet", key, make)["number"] for _ in range(2)] == [1, 1]
    assert results.cached_result("sheet", {**key, "weights": "b"}, make)["number"] == 2
    (tmp_path / "picture.png").unlink()
    assert results.cached_result("sheet", {**key, "weights": "b"}, make)["number"] == 3
    (tmp_path / "stages" / "sheet.json").write_text('{"key"')  # as left by a killed process
    assert results.cached_result("sheet", key, make) == results.read("sheet")
    assert results.read("sheet")["number"] == 4 and results.read("sheet")["seconds"] >= 0


def test_the_demos_styles_and_drawings_exist_and_its_new_style_is_new():
    plan = Plan()
    assert set(plan.styles) | {STYLE} <= set(STYLES) and STYLE not in plan.styles
    assert all(prompt.endswith(f", {STYLE}") for prompt in plan.pairs)
    assert {sketch.drawing for sketch in plan.sketches} == set(DRAWINGS)


def test_the_demos_fine_tuning_is_the_shipped_model_with_its_recipe_on_two_workers(
    tmp_path, tiny_weights
):
    recipe = presets.get("emoji-base")
    preset = tuning_preset(tmp_path, Plan(), tiny_weights["base"])
    assert preset.model == load_config(tiny_weights["base"]).model_copy(
        update={"name": "nano-base-outline"}
    )
    assert preset.train.start_from == str(tiny_weights["base"])
    assert (preset.train.workers, preset.train.zero_stage) == (2, 2)
    assert preset.data.corpus == str(tmp_path / "clean" / "train") and not preset.data.shares
    for name in ("empty_caption_rate", "generate_rate"):
        assert getattr(preset.data, name) == getattr(recipe.data, name)
    assert preset.train.min_snr == recipe.train.min_snr
    assert preset.train.learning_rate < recipe.train.learning_rate


@pytest.mark.parametrize("name", ["nano-base", "nano-upsampler"])
def test_the_smallest_models_train_from_scratch_on_two_workers_with_zero_2(name):
    preset = presets.get(name)
    assert (preset.train.workers, preset.train.zero_stage) == (2, 2)
    assert preset.train.start_from is None


# -- whole demo ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder of tarballs: the real names, and a set of 60 drawings in place of OpenMoji."""
    folder = tmp_path_factory.mktemp("packages")
    names = fetch_packages(folder, [NAMES, KEYWORDS])[0].json("data-by-emoji.json")
    things = [
        (thing["slug"].replace("_", "-"), "-".join(f"{ord(c):x}" for c in emoji))
        for emoji, thing in names.items()
        if thing["group"] == "Animals & Nature"
    ]
    chosen = [one for one in things if not is_held_out(one[1])][:50]
    chosen += [one for one in things if is_held_out(one[1])][:10]
    icons = {name: {"body": drawing(n)} for n, (name, _) in enumerate(chosen)}
    package, version = STYLES[STYLE].source
    path = folder / f"{package.strip('@').replace('/', '-')}-{version}.tgz"
    files = {
        "icons.json": {"icons": icons, "width": 16, "height": 16},
        "chars.json": {code: name for name, code in chosen},
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member, data = tarfile.TarInfo(f"package/{name}"), json.dumps(content).encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder


def drawing(number):
    """SVG shapes that differ for each number, so that no two drawings are near-duplicates."""
    draws = np.random.default_rng(number)
    return "".join(
        '<rect x="{}" y="{}" width="{}" height="{}" fill="#{:06x}"/>'.format(
            *draws.integers(0, 12, 2), *draws.integers(2, 9, 2), draws.integers(1 << 24)
        )
        for _ in range(6)
    )


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Replace the shipped weights by a tiny pair; returns a function that packs one from a seed."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "pretrained")
    source = Source(
        package="@iconify-json/noto",
        version="1",
        licence="Apache-2.0",
        author="Google Inc",
        url="https://github.com/googlefonts/noto-emoji",
    )

    def write(seed):
        made = []
        for kind in ("base", "upsampler"):
            config = tiny(kind, "model.unet.inpaint=true").model
            state = random_model(config.unet, seed).state_dict()
            made.append(packing.Trained(config, state, (source,), {"seed": seed}))
        packing.pack(*made, notes=packing.Notes())

    write(0)
    return write


@pytest.fixture
def shared_ray(ray_session, monkeypatch):
    """The Ray session of the tests, which the demo must not disconnect."""
    from glide_ray.distributed import cluster as local

    monkeypatch.setattr(local, "disconnect", lambda: None)


class Images(HTMLParser):
    """The images of a page (`images`), and its scripts, links and frames (`loads`)."""

    def __init__(self, page):
        super().__init__()
        self.images, self.loads = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag in ("script", "link", "iframe"):
            self.loads.append(tag)


def images_of(out):
    """Sources of the images on the page.

    Checks that every image exists and has an alternative text, and that nothing else is loaded.
    """
    text = (out / "index.html").read_text()
    page = Images(text)
    assert not page.loads and "url(" not in text and "@import" not in text
    for image in page.images:
        assert (out / image["src"]).is_file(), image
        assert len(image["alt"]) > 5, image
    return [image["src"] for image in page.images]


@pytest.mark.slow
def test_the_demo_leaves_a_page_with_all_of_it_and_is_not_made_twice(
    tmp_path, pair, packages, shared_ray, capsys, caplog
):
    caplog.set_level("INFO", "glide_ray")
    out = tmp_path / "demo"
    run(out, SMALL, packages)
    shown = images_of(out)
    assert len(shown) == 2 * 2 + 12 + 1 + 2 * 2 + 3 + 3 + 2
    assert all((out / name).is_file() for name in PICTURES)
    check_tuned(out)
    check_answers(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    run(out, SMALL, packages)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} == {"index.html"}
    assert "fine-tuning" in caplog.messages[-1] and str(out / "index.html") in caplog.messages[-1]

    assert main(["demo", "--out", str(out), "--images", str(tmp_path / "images")]) == 0
    copies = sorted((tmp_path / "images").iterdir())
    assert {path.name for path in copies} == {
        Path(name).with_suffix(".webp").name for name in PICTURES
    }
    assert sum(path.stat().st_size for path in copies) < MAX_BYTES
    assert capsys.readouterr().out.count("bytes") == len(PICTURES)


def check_tuned(out):
    """Check that the tuned weights credit their sources and were trained on clean rows only."""
    tuned = Results(out).read("tuning")
    weights = out / tuned["weights"]
    packaged = {source.package for source in sources_in(load_metadata(weights), weights)}
    assert packaged == {"@iconify-json/noto", STYLES[STYLE].package}
    assert tuned["steps"] == 4 and tuned["before"] > 0 and tuned["after"] > 0
    corpus = Results(out).read("corpus")
    rows = [
        sample for path in (out / "clean" / "train").glob("*.tar") for sample in read_shard(path)
    ]
    assert len(rows) == corpus["kept"]["train"] <= 50 and len(rows) > 30
    assert all(sample.captions[0].endswith(f", {STYLE}") for sample in rows)
    assert corpus["read"] == sum(corpus["kept"].values()) + sum(corpus["dropped"].values())


def check_answers(out):
    """Check that both models received the same prompts and seeds, and known pixels were kept."""
    answers = Results(out).read("answers")
    assert [model["id"] for model in answers["models"]] == ["nano-base", "nano-base-outline"]
    for pair in answers["pairs"]:
        before, after = (read_recipe(out / pair[when])[0] for when in ("before", "after"))
        assert (before.prompt, before.seed) == (after.prompt, after.seed)
        assert before.models["base"].name != after.models["base"].name
        assert before.models["upsampler"].sha256 == after.models["upsampler"].sha256
    edited = np.asarray(Image.open(out / answers["edit"]["after"]))
    whole = np.asarray(Image.open(out / answers["edit"]["before"]))
    known = left_part(len(whole), 1 / 2)
    assert np.array_equal(edited[known], whole[known]) and (edited != whole).any()
    first, grown = (np.asarray(Image.open(out / step["file"])) for step in answers["scene"])
    assert grown.shape[1] == first.shape[1] * 15 // 8
    assert np.array_equal(grown[:, : first.shape[1]], first)
    sketches = [
        read_recipe(out / answer["file"])[0] for answer in answers["sketches"][0]["answers"]
    ]
    assert [(one.task, one.strength) for one in sketches] == [("vary", 0.5), ("vary", 0.9)]


def test_without_the_packages_the_sheet_is_there_and_new_weights_make_it_again(
    tmp_path, pair, shared_ray
):
    out, empty = tmp_path / "demo", tmp_path / "none"
    empty.mkdir()
    pictures = []
    for seed in (0, 1):
        pair(seed)
        shipped.shipped_card()
        with pytest.raises(EmojiError, match=r"npm pack @iconify-json/openmoji") as error:
            run(out, SMALL, empty)
        assert str(error.value).count("\n") == 0
        pictures.append((out / "things-by-styles.png").read_bytes())
        assert len(images_of(out)) == 4 and "next stages" in (out / "index.html").read_text()
    assert pictures[0] != pictures[1]


def test_without_shipped_weights_the_demo_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "is missing" in capsys.readouterr().err


def test_pictures_are_not_copied_from_a_demo_that_was_not_made(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--images", str(tmp_path / "images")]) == 2
    assert "run `glide demo` to its end first" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


def test_large_pictures_are_copied_at_a_lower_quality_or_refused(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for name in PICTURES:
        (tmp_path / name).write_bytes(encode(noise))
    least = len(PICTURES) * len(encode(noise, "webp", quality=60))
    monkeypatch.setattr("glide_ray.experiments.demo.page.MAX_BYTES", least)
    assert sum(path.stat().st_size for path in copy_pictures(tmp_path, tmp_path / "a")) == least
    monkeypatch.setattr("glide_ray.experiments.demo.page.MAX_BYTES", least - 1)
    with pytest.raises(UserError, match="make smaller ones"):
        copy_pictures(tmp_path, tmp_path / "b")


# -- the client ----------------------------------------------------------------------------------


def client_of(answer, out):
    http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    return Client(http, out, SampleOptions(steps=3), lambda: None)


def answering(pixels):
    image = base64.b64encode(encode(pixels)).decode()
    return lambda request: httpx.Response(200, json={"data": [{"b64_json": image}]})


def test_an_edit_that_changes_what_was_to_be_kept_is_refused(tmp_path):
    image, known = np.full((8, 8, 3), 7, np.uint8), left_part(8, 1 / 2)
    changed = image.copy()
    changed[:, 4:] = 200
    kept = client_of(answering(changed), tmp_path).edit("edit", image, known, "a fox", 0)
    assert np.array_equal(kept, changed)
    changed[0, 0] = 8
    with pytest.raises(UserError, match="changed pixels that were to be kept"):
        client_of(answering(changed), tmp_path).edit("edit", image, known, "a fox", 0)


def test_a_servers_refusal_is_passed_on(tmp_path):
    def answer(request):
        assert json.loads(request.content)["steps"] == 3
        return httpx.Response(429, json={"error": {"message": "All places are taken."}})

    with pytest.raises(UserError, match="429: All places are taken"):
        client_of(answer, tmp_path).generate("fox", "a fox", 0)


def test_the_mask_is_transparent_where_to_paint():
    alpha = np.asarray(Image.open(io.BytesIO(mask_png(left_part(4, 1 / 2)))).convert("RGBA"))[
        ..., 3
    ]
    assert alpha[0].tolist() == [255, 255, 0, 0]
