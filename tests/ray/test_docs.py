"""The documentation: every command parses, and is run by a test or marked as needing a cloud.

The reference of settings must match the settings classes.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.tiny import serving_weights
from PIL import Image

from glide_ray.cli import main as cli
from glide_ray.config import presets
from glide_ray.config.overrides import override

DOCS = sorted(Path(ROOT, "docs").glob("*.md"))
COMMANDS = (
    "glide ",
    "python ",
    "ray ",
    "serve ",
    "make ",
    "kubectl ",
    "docker ",
    "aws ",
    "export ",
    "printf ",
    ".venv/",
)
MARK = re.compile(
    r"<!-- (run here(?: with (?P<more>.+))?|run by (?P<test>tests/\w+/\w+\.py)|needs a cloud.*) -->"
)


def blocks(path):
    """(mark, commands) of each block of commands; the mark says what runs it, or is None."""
    mark, lines = None, []
    for line in [*path.read_text().splitlines(), ""]:
        if line.startswith("    ") and (lines or line.strip().startswith(COMMANDS)):
            lines.append(line.strip())
        elif lines:
            yield mark, lines
            mark, lines = None, []
        if found := MARK.fullmatch(line.strip()):
            mark = found
        elif line.strip() and not line.startswith("    "):
            mark = None


def commands(path):
    return [line for _, lines in blocks(path) for line in lines]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_each_block_of_commands_is_run_by_a_test_or_needs_a_cloud(path):
    for mark, lines in blocks(path):
        assert mark is not None, f"{path.name}: nothing says what runs {lines[0]!r}"
        if mark["test"]:
            test = Path(ROOT, mark["test"]).read_text()
            for line in lines:  # the test must mention the script or the command
                name = re.search(r"(?:jobs|cluster)/(\w+)\.py|^(?:glide|make) (\w+)|^(serve)", line)
                assert name and next(filter(None, name.groups())) in test, (
                    f"{mark['test']} does not run {line!r}"
                )


@pytest.mark.parametrize("path", [*DOCS, Path(ROOT, "README.md")], ids=lambda path: path.name)
def test_commands_of_glide_and_jobs_take_the_options_that_are_shown(path):
    seen = 0
    for line in (
        commands(path)
        if path.name != "README.md"
        else [line.strip() for line in path.read_text().splitlines() if line.startswith("    ")]
    ):
        line = line.removeprefix(".venv/bin/")
        if job := re.search(r"python (jobs/\w+\.py) (.*)", line):
            parser = runpy.run_path(os.path.join(ROOT, job[1]))["parser"]()
            # Words in capitals alone, such as FOLDER, stand for arguments of the user's.
            words = ["", *shlex.split(job[2], comments=True)] if re.search("[a-z]", job[2]) else []
        elif line.startswith("glide "):
            parser, words = cli.build_parser(), shlex.split(line, comments=True)
        else:
            continue
        if words:
            options = parser.parse_args(words[1:])
            preset = getattr(options, "preset", None)
            if preset in presets.PRESETS and getattr(options, "set", None):
                override(presets.get(preset), options.set)
            seen += 1
    assert seen or path.name in (
        "architecture.md",
        "configuration.md",
        "operations.md",
        "kubernetes.md",
    )


def test_the_reference_of_settings_is_what_glide_settings_prints(capsys):
    assert cli.main(["settings"]) == 0
    assert capsys.readouterr().out == Path(ROOT, "docs", "configuration.md").read_text(), (
        "write it anew: glide settings > docs/configuration.md"
    )


def test_links_lead_somewhere():
    for path in [*DOCS, Path(ROOT, "README.md")]:
        for target in re.findall(r"(?:\]\(|src=\")(?!http)([^)#\"]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, drawn_corpus):
    """The parts of a checkout after `make demo` that the documented commands use.

    Weights of very small models, a corpus, and the scripts.
    """
    folder = tmp_path_factory.mktemp("user")
    for role, path in serving_weights(folder / "made").items():
        (folder / "runs" / "demo" / role).mkdir(parents=True)
        os.rename(path, folder / "runs" / "demo" / role / "weights.safetensors")
    for name in ("jobs", "glide_ray", "serve"):
        os.symlink(os.path.join(ROOT, name), folder / name)
    shutil.copytree(drawn_corpus, folder / "runs" / "corpus")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart.md", "training.md"])
def test_what_a_new_user_types_works_as_it_stands(folder, name):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    took = []
    for mark, lines in blocks(Path(ROOT, "docs", name)):
        if not mark.group(1).startswith("run here"):
            continue
        for line in lines:
            if line.startswith("export "):
                environment |= dict(
                    part.split("=", 1)
                    for part in shlex.split(line.removeprefix("export "))
                    if not part.startswith("PATH=")
                )
                continue
            more = f" {mark['more']}" if mark["more"] else ""
            began = time.monotonic()
            done = subprocess.run(
                ["bash", "-c", line + more],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
            took.append((time.monotonic() - began, line))
    print(*(f"{seconds:6.1f} s  {line[:120]}" for seconds, line in took), sep="\n")
    if name == "quickstart.md":
        assert (
            Image.open(folder / "heart.png").size == (256, 256)
            and len(list((folder / "runs" / "bulk").rglob("0*.png"))) == 3
        )
    else:
        assert (folder / "runs" / "mine" / "base.safetensors").exists()
