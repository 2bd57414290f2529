"""Adapters over HTTP, in this process and without Ray: load, list, name, unload, refuse."""

import base64
import json
import os

import pytest
from helpers.adapters import random_adapter
from helpers.api import CONFIG, CascadeBackend, asking

from glide_ray.config.serving import ServeConfig
from glide_ray.data.images import encode
from glide_ray.errors import UserError
from glide_ray.sampling.cascade import Cascade
from glide_ray.sampling.recipe import read_recipe
from glide_ray.sampling.reproduction import find_loras
from glide_ray.serving.api_keys import Key, key_sha256
from glide_ray.serving.loras import LOADED
from glide_ray.storage import fingerprint

LORAS, GENERATIONS = "/v1/loras", "/v1/images/generations"


@pytest.fixture(scope="module")
def backend(tiny_weights):
    return CascadeBackend(Cascade.load(tiny_weights["base"], tiny_weights["upsampler"]))


@pytest.fixture
def folder(tmp_path, tiny_weights):
    """A folder with an adapter of each model."""
    random_adapter(tmp_path / "loras/sub/cat.safetensors", tiny_weights["base"], rank=2)
    random_adapter(tmp_path / "loras/fine.safetensors", tiny_weights["upsampler"], 1)
    return tmp_path / "loras"


@pytest.fixture
def ask(backend, folder):
    return asking(backend, CONFIG.model_copy(update={"lora_folder": str(folder)}))


def load(ask, name="my-cat", path="sub/cat.safetensors"):
    return ask("POST", LORAS, json={"name": name, "path": path})


def generate(ask, *loras, **fields):
    body = {"prompt": "a cat", "seed": 5, "loras": list(loras), **fields}
    return ask("POST", GENERATIONS, json=body)


def refused(answer, status, message, param=None, code=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"], error["message"]
    assert (error["param"], error["code"]) == (param, code)


# -- load, list, unload ----------------------------------------------------------------------------


def test_a_loaded_adapter_is_listed_with_its_file_rank_and_base(ask, folder, tiny_weights):
    loaded = load(ask)
    assert loaded.status_code == 200, loaded.text
    file = folder / "sub/cat.safetensors"
    entry = loaded.json()
    assert entry.pop("created") > 1.7e9
    assert entry == {
        "object": "lora",
        "name": "my-cat",
        "path": "sub/cat.safetensors",
        "sha256": fingerprint(file),
        "bytes": file.stat().st_size,
        "rank": 2,
        "base": "nano-base",
        "base_sha256": fingerprint(tiny_weights["base"]),
        "role": "base",
        "licence": [],
        "sources": [],
    }
    assert load(ask, "fine", "fine.safetensors").json()["role"] == "upsampler"
    listed = ask("GET", LORAS).json()
    assert [one["name"] for one in listed["data"]] == ["fine", "my-cat"]
    assert listed["data"][1] == loaded.json()


def test_a_damaged_record_hides_its_own_adapter_only(ask, folder):
    assert load(ask).status_code == 200
    (folder / "loaded" / "broken.json").write_text("{")
    listed = ask("GET", LORAS)
    assert listed.status_code == 200
    assert [entry["name"] for entry in listed.json()["data"]] == ["my-cat"]


def test_another_replica_and_a_restarted_server_have_the_same_adapters(ask, backend, folder):
    load(ask)
    other = asking(backend, CONFIG.model_copy(update={"lora_folder": str(folder)}))
    assert other("GET", LORAS).json() == ask("GET", LORAS).json()
    assert other("DELETE", f"{LORAS}/my-cat").json() == {
        "object": "lora",
        "name": "my-cat",
        "deleted": True,
    }
    assert ask("GET", LORAS).json()["data"] == []
    refused(
        ask("DELETE", f"{LORAS}/my-cat"),
        404,
        "no adapter 'my-cat'; none is loaded; load it by POST /v1/loras",
        None,
        "lora_not_found",
    )
    assert (folder / "sub/cat.safetensors").exists() and load(ask).status_code == 200


def test_adapters_can_be_in_s3(backend, s3, tiny_weights, tmp_path):
    from glide_ray.storage import put

    put(
        random_adapter(tmp_path / "a.safetensors", tiny_weights["base"]),
        f"{s3}/loras/a/b.safetensors",
    )
    ask = asking(backend, CONFIG.model_copy(update={"lora_folder": f"{s3}/loras"}))
    assert load(ask, path="a/b.safetensors").status_code == 200
    refused(load(ask, path="a/b.safetensors"), 409, "is taken", "name", "lora_exists")
    refused(load(ask, "x", "none.safetensors"), 404, "no file none", "path", "file_not_found")
    assert generate(ask, {"name": "my-cat"}).status_code == 200
    assert backend.jobs[-1].loras[0].path == f"{s3}/loras/a/b.safetensors"
    assert ask("DELETE", f"{LORAS}/my-cat").status_code == 200
    assert ask("GET", LORAS).json()["data"] == []


# -- use -------------------------------------------------------------------------------------------


def test_a_request_names_adapters_and_its_png_records_them(ask, backend, folder, tmp_path):
    load(ask)
    load(ask, "fine", "fine.safetensors")
    answer = generate(ask, {"name": "my-cat", "scale": 0.8}, {"name": "fine"})
    assert answer.status_code == 200, answer.text
    used = backend.jobs[-1].loras
    assert [(one.name, one.scale, one.role) for one in used] == [
        ("my-cat", 0.8, "base"),
        ("fine", 1.0, "upsampler"),
    ]
    files = [folder / "sub/cat.safetensors", folder / "fine.safetensors"]
    assert [one.path for one in used] == [str(file) for file in files]
    picture = tmp_path / "a.png"
    picture.write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    assert str(folder).encode() not in picture.read_bytes()
    recipe = read_recipe(picture)[0]
    assert [(one.name, one.sha256, one.scale) for one in recipe.loras] == [
        ("my-cat", fingerprint(files[0]), 0.8),
        ("fine", fingerprint(files[1]), 1.0),
    ]
    found = find_loras(recipe, [str(file) for file in files])
    assert [(one.path, one.scale) for one in found] == [(str(files[0]), 0.8), (str(files[1]), 1)]
    with pytest.raises(UserError, match=r"adapter 'my-cat' \(SHA-256 .*not there.*--lora"):
        find_loras(recipe, [str(files[1])])


def test_a_picture_without_the_upsampler_records_no_adapter_of_it(ask, tmp_path):
    load(ask)
    load(ask, "fine", "fine.safetensors")
    answer = generate(ask, {"name": "fine"}, {"name": "my-cat"}, size="16x16")
    picture = tmp_path / "a.png"
    picture.write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    assert [one.name for one in read_recipe(picture)[0].loras] == ["my-cat"]


@pytest.mark.parametrize("kind", ["edits", "variations"])
def test_a_form_has_them_as_json(ask, backend, kind):
    load(ask)
    image = {"image": ("i.png", encode(backend_image()), "image/png")}

    def send(loras):
        fields = {"prompt": "a dog", "loras": loras}
        return ask("POST", f"/v1/images/{kind}", data=fields, files=image)

    assert send(json.dumps([{"name": "my-cat", "scale": -0.5}])).status_code == 200
    assert backend.jobs[-1].loras[0].scale == -0.5
    refused(send("my-cat"), 400, "loras is not valid JSON", "loras", "invalid_json")
    refused(send("[" * 100_000), 400, "loras is not valid JSON", "loras", "invalid_json")
    refused(send('"my-cat"'), 400, "loras: Input should be a valid list", "loras", "invalid_value")


def backend_image():
    import numpy as np

    return np.full((64, 64, 4), 99, np.uint8)


# -- refusals --------------------------------------------------------------------------------------


def test_requests_are_refused_by_the_name_of_what_is_wrong(ask):
    load(ask)
    refused(
        generate(ask, {"name": "my-cot"}),
        404,
        "no adapter 'my-cot'; did you mean 'my-cat'?",
        "loras",
        "lora_not_found",
    )
    refused(
        generate(ask, {"name": f"../{LOADED}/my-cat"}), 404, "no adapter", "loras", "lora_not_found"
    )
    refused(
        generate(ask, {"name": "my-cat", "scale": 11}),
        400,
        "loras.0.scale: Input should be less than or equal to 10",
        "loras",
        "invalid_value",
    )
    refused(
        generate(ask, {"scale": 1}),
        400,
        "loras.0.name is missing",
        "loras",
        "missing_required_parameter",
    )
    refused(
        generate(ask, {"name": "my-cat", "weight": 1}),
        400,
        "no field 'loras.0.weight'",
        "loras",
        "unknown_parameter",
    )
    refused(
        generate(ask, *[{"name": "my-cat"}] * 9), 400, "at most 8 items", "loras", "invalid_value"
    )


def test_files_are_refused_by_the_name_of_what_is_wrong(ask, folder, tiny_weights, tmp_path):
    load(ask)
    refused(load(ask), 409, "my-cat is taken; choose another", "name", "lora_exists")
    missing = "no file none.safetensors in the server's lora_folder"
    refused(load(ask, "x", "none.safetensors"), 404, missing, "path", "file_not_found")
    (folder / "damaged.safetensors").write_bytes(b"x" * 100)
    (folder / "whole.safetensors").write_bytes(tiny_weights["base"].read_bytes())
    cut = (folder / "fine.safetensors").read_bytes()[:-8]
    (folder / "cut.safetensors").write_bytes(cut)
    for name in ("damaged", "whole", "cut"):
        sentence = f"{name}.safetensors is not a whole adapter in the safetensors format"
        refused(load(ask, "x", f"{name}.safetensors"), 400, sentence, "path", "not_an_adapter")
    random_adapter(folder / "o.safetensors", tiny_weights["base"], base_sha256="0" * 64)
    sentence = "o.safetensors is an adapter of nano-base with SHA-256 0000000000000000..., and the"
    answer = load(ask, "x", "o.safetensors")
    refused(answer, 400, sentence, "path", "lora_of_other_weights")
    own = fingerprint(tiny_weights["base"])[:16]
    assert f"nano-base ({own}...); train it on one of them" in answer.json()["error"]["message"]
    assert str(tmp_path) not in answer.text
    crafted = fingerprint(tiny_weights["base"])
    random_adapter(folder / "up.safetensors", tiny_weights["upsampler"], base_sha256=crafted)
    refused(
        load(ask, "x", "up.safetensors"), 400, "the kind upsampler", "path", "lora_of_other_weights"
    )
    assert [one["name"] for one in ask("GET", LORAS).json()["data"]] == ["my-cat"]


@pytest.mark.parametrize(
    "path",
    [
        "../out.safetensors",
        "/etc/passwd",
        "sub/../../out.safetensors",
        "s3://bucket/a.safetensors",
        ".hidden.safetensors",
        "sub//cat.safetensors",
        "sub/cat.pickle",
        "sub\\cat.safetensors",
        "",
    ],
)
def test_a_path_outside_of_the_folder_is_refused(ask, folder, path):
    (folder.parent / "out.safetensors").write_bytes((folder / "sub/cat.safetensors").read_bytes())
    answer = load(ask, "x", path)
    refused(answer, 400, "path: String should match pattern", "path", "invalid_value")


def test_a_link_that_leads_out_of_the_folder_is_refused(ask, folder):
    outside = folder.parent / "out.safetensors"
    os.rename(folder / "sub/cat.safetensors", outside)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "folder").symlink_to(folder.parent)
    for path in ("link.safetensors", "folder/out.safetensors"):
        refused(load(ask, "x", path), 400, f"{path} leads out of the server's lora_folder", "path")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "a b", "x" * 65, "\n"])
def test_a_name_that_is_no_file_name_is_refused(ask, name):
    refused(load(ask, name), 400, "name: String should match pattern", "name", "invalid_value")


def test_the_number_and_the_size_of_adapters_are_limited(backend, folder):
    few = {"lora_folder": str(folder), "max_loras": 1}
    ask = asking(backend, CONFIG.model_copy(update=few))
    load(ask)
    sentence = "has 1 adapters, at most 1 (max_loras); unload one by DELETE"
    refused(load(ask, "x", "fine.safetensors"), 409, sentence, None, "too_many_loras")
    ask("DELETE", f"{LORAS}/my-cat")
    assert load(ask, "x", "fine.safetensors").status_code == 200
    small = asking(backend, CONFIG.model_copy(update={**few, "max_loras": 9, "lora_bytes": 1000}))
    answer = load(small)
    refused(answer, 400, "MiB of adapters (lora_bytes); train one", "path", "lora_too_large")


def test_an_adapter_of_another_model_of_the_server_is_refused(ask, backend, tiny_weights):
    load(ask, "fine", "fine.safetensors")
    small = CascadeBackend(Cascade(backend.cascade.base, sources={"base": tiny_weights["base"]}))
    small.sizes = (16,)
    ask.state.models = {**ask.state.models, "small": small}
    ask.state.admission.capacity["small"] = 8
    refused(
        generate(ask, {"name": "fine"}, model="small"),
        400,
        "fine is an adapter of nano-upsampler with SHA-256",
        "loras",
        "lora_of_other_weights",
    )


def test_a_server_without_a_folder_has_no_adapters(backend):
    ask = asking(backend, ServeConfig())
    assert ask("GET", LORAS).json() == {"object": "list", "data": []}
    refused(load(ask), 404, "start it with --set lora_folder=FOLDER", "path", "no_lora_folder")
    refused(generate(ask, {"name": "x"}), 404, "none is loaded", "loras", "lora_not_found")
    assert generate(ask).status_code == 200 and backend.jobs[-1].loras == ()


def test_with_keys_every_call_needs_one(backend, folder):
    config = CONFIG.model_copy(update={"lora_folder": str(folder)})
    key = "k" * 20
    ask = asking(backend, config, {"ann": Key(sha256=key_sha256(key))})
    body = {"json": {"name": "a", "path": "fine.safetensors"}}
    calls = [("GET", LORAS, {}), ("POST", LORAS, body), ("DELETE", f"{LORAS}/a", {})]
    for method, path, content in calls:
        refused(ask(method, path, **content), 401, "API key is required", None, "missing_api_key")
    for method, path, content in calls:
        headers = {"Authorization": f"Bearer {key}"}
        assert ask(method, path, headers=headers, **content).status_code == 200
    away = asking(backend, config, client="192.0.2.9")
    for method, path, content in calls:
        assert away(method, path, **content).status_code == 403


def test_unknown_fields_of_its_body_are_compared_with_its_own(ask):
    answer = ask("POST", LORAS, json={"name": "a", "path": "b.safetensors", "nam": 1})
    refused(answer, 400, "no field 'nam'; did you mean 'name'?", "nam", "unknown_parameter")
