"""The page /docs on a machine without the internet."""

import re

import pytest
from starlette.testclient import TestClient

from glide_ray.config.serving import ServeConfig
from glide_ray.serving.admission import Admission
from glide_ray.serving.metrics import Metrics
from glide_ray.serving.routes import build_api
from glide_ray.serving.state import ServerState


def test_the_documentation_page_asks_no_other_server(stranger):
    page = stranger.get("/docs")
    assert page.status_code == 200 and "http://" not in page.text and "https://" not in page.text
    for path in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        found = stranger.get("/" + path)
        assert found.status_code == 200 and len(found.content) > 1000
    assert "SwaggerUIBundle" in stranger.get("/docs/swagger-ui-bundle.js").text


def test_the_root_leads_to_the_documentation_page(stranger):
    page = stranger.get("/")
    assert page.status_code == 200 and page.url.path == "/docs"


@pytest.fixture
def stranger():
    """A client of the API on another machine, which has no key."""
    state = ServerState({}, Admission({}, {}), Metrics("test"))
    return TestClient(build_api(lambda: state, ServeConfig()), client=("192.0.2.9", 50000))
