"""The API matches its OpenAPI schema: schemathesis draws valid and invalid requests from it."""

from dataclasses import replace

import pytest
import schemathesis
from helpers.api import CascadeBackend, asking
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from glide_ray.config.serving import ServeConfig
from glide_ray.sampling.cascade import Cascade
from glide_ray.serving.schema import Edit

pytestmark = pytest.mark.slow
EXAMPLES = 100  # requests for each operation


class Quick(CascadeBackend):
    """The real cascade with at most 2 steps and 2 candidates, whatever a request asks for."""

    async def make(self, job, show=None):
        few = {
            name: min(2, getattr(job.options, name) or 2) for name in ("steps", "upsampler_steps")
        }
        return await super().make(
            replace(job, options=job.options.model_copy(update=few), best_of=min(2, job.best_of)),
            show,
        )


@pytest.fixture(scope="module")
def schema(tiny_weights):
    backend = Quick(
        Cascade.load(tiny_weights["base"], tiny_weights["upsampler"], clip=tiny_weights["clip"])
    )
    return schemathesis.openapi.from_asgi(
        "/openapi.json", asking(backend, ServeConfig(max_images=2), capacity=1000).api
    )


OPERATIONS = [
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("POST", "/v1/images/variations"),
    ("GET", "/v1/models"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]


def test_all_that_is_described_is_tried(schema):
    assert {
        (found.ok().method.upper(), found.ok().path) for found in schema.get_all_operations()
    } == set(OPERATIONS)


def becomes_valid_text(body):
    """Whether a form makes an invalid value valid: on the wire a form has only text.

    A number in a field of text is text, and an empty list is a field left out.
    """
    if not isinstance(body, dict):
        return False
    texts = {
        name
        for name, field in Edit.model_json_schema()["properties"].items()
        if any(kind.get("type") == "string" for kind in (field, *field.get("anyOf", [])))
    }
    return any(
        value == [] or (name in texts and not isinstance(value, str | bytes))
        for name, value in body.items()
    )


# Without a body there is nothing that could be invalid, hence no negative tests of GET.
@pytest.mark.parametrize(
    "method, path, mode",
    [
        (method, path, mode)
        for method, path in OPERATIONS
        for mode in GenerationMode
        if method == "POST" or mode == GenerationMode.POSITIVE
    ],
)
def test_the_api_keeps_to_its_description(schema, method, path, mode):
    excluded = []
    in_a_form = path.endswith(("edits", "variations"))
    # The schema can only say that a file is bytes, and random bytes are no image.
    if in_a_form:
        excluded = [
            check for check in CHECKS.get_all() if check.__name__ == "positive_data_acceptance"
        ]

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def ask(case):
        if mode == GenerationMode.NEGATIVE and in_a_form:
            assume(not becomes_valid_text(case.body))
        case.call_and_validate(excluded_checks=excluded)

    ask()
