"""The API matches its OpenAPI schema: schemathesis draws valid and invalid requests from it."""

import json
from contextlib import suppress
from dataclasses import replace
from email.parser import BytesParser
from email.policy import HTTP

import numpy as np
import pytest
import schemathesis
from helpers.api import CascadeBackend, asking
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from glide_ray.config.serving import ServeConfig
from glide_ray.data.images import encode
from glide_ray.sampling.cascade import Cascade

FIXED, NEW = 100, 400  # requests for each operation
# Files are drawn as text with a character for each byte, because schemathesis cannot negate a file:
# its validator has no type for bytes. `ask` sends them as bytes.
PNG = encode(np.full((64, 64, 4), 99, np.uint8))
schemathesis.openapi.format(
    "binary", (st.just(PNG) | st.binary()).map(lambda content: content.decode("latin-1"))
)


class Quick(CascadeBackend):
    """The real cascade with at most 2 steps and 2 candidates, whatever a request asks for."""

    async def make(self, job, on_preview=None):
        few = {
            name: min(2, getattr(job.options, name) or 2) for name in ("steps", "upsampler_steps")
        }
        return await super().make(
            replace(job, options=job.options.model_copy(update=few), best_of=min(2, job.best_of)),
            on_preview,
        )


@pytest.fixture(scope="module")
def api(tiny_weights):
    backend = Quick(
        Cascade.load(tiny_weights["base"], tiny_weights["upsampler"], clip=tiny_weights["clip"])
    )
    return asking(backend, ServeConfig(max_images=2), capacity=1000)


@pytest.fixture(scope="module")
def schema(api):
    return schemathesis.openapi.from_asgi("/openapi.json", api.api)


GENERATIONS, EDITS, VARIATIONS = (
    f"/v1/images/{kind}" for kind in ("generations", "edits", "variations")
)
FORMS = (EDITS, VARIATIONS)
OPERATIONS = [
    ("POST", GENERATIONS),
    ("POST", EDITS),
    ("POST", VARIATIONS),
    ("GET", "/v1/models"),
    ("GET", "/v1/loras"),
    ("POST", "/v1/loras"),
    ("DELETE", "/v1/loras/{name}"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]


def test_all_that_is_described_is_tried(schema):
    assert {
        (found.ok().method.upper(), found.ok().path) for found in schema.get_all_operations()
    } == set(OPERATIONS)


# -- forms -----------------------------------------------------------------------------------------

BOOLEANS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}


def parts_of(request):
    """The parts of a multipart body by name: text, or None for a file."""
    content_type, parts = request.headers.get("Content-Type", ""), {}
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + (request.body or b""))
    for part in message.iter_parts() if message.is_multipart() else ():
        name = part.get_param("name", header="content-disposition")
        text = part.get_payload(decode=True).decode(errors="replace")
        parts.setdefault(name, []).append(None if part.get_filename() is not None else text)
    return parts


def readings(text):
    """What a form's text may stand for: itself, JSON, a number, or a word for true or false."""
    yield text
    for read in (json.loads, int, float, lambda text: BOOLEANS[text.lower()]):
        with suppress(ValueError, KeyError):
            yield read(text)


def is_invalid(parts, schema):
    """Whether a form breaks the schema of its fields, whichever way its text is read."""
    fields = schema["properties"]
    return (
        not set(schema["required"]) <= set(parts) <= set(fields)
        or any(len(values) > 1 for values in parts.values())
        or any(
            value is not None
            and not any(Draft202012Validator(fields[name]).is_valid(r) for r in readings(value))
            for name, (value,) in parts.items()
        )
    )


FORM = {
    "properties": {
        "image": {"type": "string", "format": "binary"},
        "n": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 3}, {"type": "null"}]},
        "stream": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "user": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
    },
    "required": ["image"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "parts, expected",
    [
        ({"image": [None]}, False),
        ({"image": [None], "n": ["0.0"]}, False),
        ({"image": [None], "n": ["null"]}, False),
        ({"image": [None], "user": ["7"]}, False),
        ({"image": [None], "stream": ["Yes"]}, False),
        ({"image": [None], "n": ["4"]}, True),
        ({"image": [None], "n": ["0.5"]}, True),
        ({"image": [None], "n": [""]}, True),
        ({"image": [None], "stream": ["2"]}, True),
        ({"image": [None], "user": ["false"]}, True),
        ({"image": [None], "n": ["1", "1"]}, True),
        ({"image": [None], "m": ["1"]}, True),
        ({"n": ["1"]}, True),
    ],
)
def test_a_form_is_invalid_if_no_reading_of_its_text_is_valid(parts, expected):
    assert is_invalid(parts, FORM) is expected


# Draws that once failed: each answer must fit what the text of the form means.
@pytest.mark.parametrize(
    "path, fields, status",
    [
        (VARIATIONS, {"safety_identifier": "7"}, 200),
        (VARIATIONS, {"safety_identifier": "[]"}, 200),
        (VARIATIONS, {"safety_identifier": "x" * 512}, 200),
        (VARIATIONS, {"safety_identifier": "x" * 513}, 400),
        (VARIATIONS, {"partial_images": "0.0"}, 200),
        (EDITS, {"partial_images": "0.5"}, 400),
        (EDITS, {"stream": "2"}, 400),
        (EDITS, {"seed": str(2**63)}, 400),
        (EDITS, {"seed": str(2**63 - 1)}, 200),
    ],
)
def test_a_form_is_read_as_the_text_that_it_is(api, path, fields, status):
    answer = api("POST", path, files={"image": ("i.png", PNG)}, data={"prompt": "x"} | fields)
    assert answer.status_code == status, answer.text


# -- drawn requests --------------------------------------------------------------------------------


def keeps_to_its_description(schema, method, path, mode, **drawn):
    """Send requests drawn from the description, and check the answers against it."""
    operation = schema[path][method]
    excluded = {
        # The schema can only say that a file is bytes, and random bytes are no image.
        GenerationMode.POSITIVE: "positive_data_acceptance",
        # An invalid value may be valid as the text that it becomes in a form: see `is_invalid`.
        GenerationMode.NEGATIVE: "negative_data_rejection",
    }[mode]
    excluded = [c for c in CHECKS.get_all() if path in FORMS and c.__name__ == excluded]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=drawn.pop("count"),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        print_blob=True,
        **drawn,
    )
    def ask(case):
        if path in FORMS and isinstance(case.body, dict):
            for name in {"image", "mask"} & set(case.body):
                if isinstance(case.body[name], str):
                    case.body[name] = case.body[name].encode("latin-1", errors="replace")
        answer = case.call()
        case.validate_response(answer, excluded_checks=excluded)
        if path in FORMS:
            body = operation.definition.raw["requestBody"]["content"]["multipart/form-data"]
            parts = parts_of(answer.request)
            if is_invalid(parts, body["schema"]):
                assert 400 <= answer.status_code < 500, (answer.status_code, parts)

    ask()


# Without a body there is nothing that could be invalid, hence no negative tests of GET.
every_operation = pytest.mark.parametrize(
    "method, path, mode",
    [
        (method, path, mode)
        for method, path in OPERATIONS
        for mode in GenerationMode
        if method == "POST" or mode == GenerationMode.POSITIVE
    ],
)


@every_operation
def test_the_api_keeps_to_its_description(schema, method, path, mode):
    keeps_to_its_description(schema, method, path, mode, count=FIXED, derandomize=True)


@pytest.mark.slow
@every_operation
def test_the_api_keeps_to_its_description_in_new_draws(schema, method, path, mode):
    keeps_to_its_description(schema, method, path, mode, count=NEW)
