"""Trackers with their real packages: what they log is read back, restarted runs are continued.

A store that fails stops nothing.
"""

import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import tiny
from PIL import Image

from glide_ray.bench.load_generator import free_port
from glide_ray.config.overrides import override
from glide_ray.errors import UserError
from glide_ray.train import trackers
from glide_ray.train.trackers import open_trackers

PICTURE = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


@pytest.fixture(autouse=True)
def isolated_environment(monkeypatch, tmp_path):
    """Hide the user's configuration, and shorten the waits between retries."""
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.1)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
        "WANDB_SILENT": "true",
        "WANDB_CONFIG_DIR": str(tmp_path),
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": str(tmp_path / "mlruns"),
    }.items():
        monkeypatch.setenv(name, value)


def start(folder, name, first_step=0, warned=None, settings=()):
    """(tracker, list of its warnings)."""
    warned = [] if warned is None else warned
    return open_trackers(
        [name], folder, tiny("base", *settings), "run-7", first_step, warned.append
    ), warned


def until(condition, seconds=90):
    """Wait until the condition holds; errors count as false, since files may be incomplete."""
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except Exception:
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


# -- TensorBoard -----------------------------------------------------------------------------------


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(
        str(folder / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}
    ).Reload()


def scalars(folder, name):
    return [(event.step, pytest.approx(event.value)) for event in events(folder).Scalars(name)]


def texts(folder, name):
    return [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events(folder).Tensors(f"{name}/text_summary")
    ]


def test_tensorboard_contains_figures_pictures_events_and_the_preset(tmp_path):
    run_trackers, warned = start(tmp_path, "tensorboard")
    run_trackers.metrics(0, {"held_out": 1.5})
    run_trackers.metrics(
        10, {"step": 10, "loss": 0.5, "epoch": 1, "device": "cpu", "nothing": float("nan")}
    )
    run_trackers.image(8, "samples", PICTURE)
    run_trackers.add_event(9, "a worker was lost")
    run_trackers.close()
    run_trackers.close()
    assert scalars(tmp_path, "held_out") == [(0, 1.5)] and scalars(tmp_path, "loss") == [(10, 0.5)]
    assert set(events(tmp_path).Tags()["scalars"]) == {"held_out", "loss", "epoch", "nothing"}
    picture = events(tmp_path).Images("samples")[0]
    assert picture.step == 8 and np.array_equal(
        np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))), PICTURE
    )
    assert texts(tmp_path, "notes") == [(9, "a worker was lost")]
    assert "| train.batch | " in texts(tmp_path, "preset")[0][1] and not warned


def test_after_a_restart_tensorboard_has_each_step_once_with_its_latest_values(tmp_path):
    before, _ = start(tmp_path, "tensorboard")
    for step in (0, 10, 20, 30):
        before.metrics(step, {"loss": step})
        before.metrics(step, {"held_out": step})
    before.close(failed=True)
    again, _ = start(tmp_path, "tensorboard", first_step=11)  # resumed from step 10's checkpoint
    for step in (20, 30, 40):
        again.metrics(step, {"loss": step + 0.5})
    again.close()
    assert scalars(tmp_path, "loss") == [(0, 0), (10, 10), (20, 20.5), (30, 30.5), (40, 40.5)]
    assert scalars(tmp_path, "held_out") == [(0, 0), (10, 10)]


@pytest.mark.parametrize("rewinds", [False, True])
def test_repeated_steps_appear_once(tmp_path, rewinds):
    run_trackers, _ = start(tmp_path, "tensorboard")
    for step in (10, 20, 30):
        run_trackers.metrics(step, {"loss": step})
    if rewinds:
        run_trackers.rewind(11)
    for step in (20, 30, 40):
        run_trackers.metrics(step, {"loss": step + 0.5})
    run_trackers.metrics(30, {"average_held_out": 7})  # computed in the background, hence late
    run_trackers.close()
    own = 0.5 if rewinds else 0
    assert scalars(tmp_path, "loss") == [(10, 10), (20, 20 + own), (30, 30 + own), (40, 40.5)]
    assert scalars(tmp_path, "average_held_out") == [(30, 7)]


# The warning is about TensorBoard's own thread.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unwritable_tensorboard_folder_gives_one_warning_and_does_not_stop_training(tmp_path):
    run_trackers, warned = start(tmp_path, "tensorboard")
    run_trackers.metrics(10, {"loss": 1})
    until(lambda: (tmp_path / "tensorboard").exists() and scalars(tmp_path, "loss"))
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    for step in (20, 30):
        run_trackers.metrics(step, {"loss": 2})
    until(lambda: warned)
    time.sleep(0.3)
    (tmp_path / "tensorboard").unlink()
    run_trackers.metrics(40, {"loss": 3})
    run_trackers.close()
    assert (
        len(warned) == 1
        and warned[0].startswith("TensorBoard cannot be written to: ")
        and "Training continues" in warned[0]
    )
    assert scalars(tmp_path, "loss") == [(20, 2), (30, 2), (40, 3)]


# -- MLflow ----------------------------------------------------------------------------------------


def mlflow_runs(uri=None):
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return client, client.search_runs([client.get_experiment_by_name("glide_ray").experiment_id])


def history(name, uri=None):
    client, (run,) = mlflow_runs(uri)
    return [
        (metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)
    ]


def test_a_restarted_run_continues_its_mlflow_run(tmp_path):
    run_trackers, warned = start(tmp_path, "mlflow")
    run_trackers.metrics(10, {"loss": 0.5, "held_out": 0.25})
    run_trackers.metrics(20, {"loss": 0.4})
    run_trackers.image(10, "samples", PICTURE)
    run_trackers.add_event(10, "a worker was lost")
    run_trackers.add_event(10, "it is back")
    run_trackers.close(failed=True)
    client, (run,) = mlflow_runs()
    assert run.info.status == "FAILED" and run.info.run_name == "nano-base"
    again, _ = start(tmp_path, "mlflow", first_step=11, warned=warned, settings=["steps=77"])
    again.add_event(10, "it is back")
    again.metrics(20, {"loss": 0.45})
    again.metrics(30, {"loss": 0.3})
    again.close()
    client, (run,) = mlflow_runs()
    assert history("loss") == [(10, 0.5), (20, 0.4), (30, 0.3)] and history("held_out") == [
        (10, 0.25)
    ]
    assert (
        run.data.params["train.batch"] == str(tiny().train.batch)
        and run.data.params["model.unet.multipliers"] == "(1, 2)"
    )
    # MLflow's parameters cannot be changed, so the new value is a tag.
    assert (
        run.data.params["train.steps"] == str(tiny().train.steps)
        and run.data.tags["train.steps"] == "77"
    )
    assert run.data.tags["note.000000010"] == "a worker was lost\nit is back"
    assert run.info.status == "FINISHED"
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "images")]
    assert (
        len([path for path in pictures if "samples+step+10+" in path and path.endswith(".png")])
        == 1
    )
    assert not warned


def test_values_refused_by_mlflow_are_dropped_and_the_others_arrive(tmp_path):
    run_trackers, warned = start(tmp_path, "mlflow")
    run_trackers.metrics(10, {"loss (%)": 1})
    run_trackers.metrics(20, {"loss": 2})
    run_trackers.close()
    assert history("loss") == [(20, 2)]
    assert len(warned) == 1 and "loss (%)" in warned[0]


class MlflowServer:
    """MLflow's own server on loopback, in a separate process.

    Each line on the process's standard input stops the server or starts it again.
    """

    program = """
import logging, sys, threading
from mlflow.server import app
from werkzeug.serving import make_server
logging.getLogger("werkzeug").setLevel(logging.ERROR)
while True:
    server = make_server("127.0.0.1", int(sys.argv[1]), app)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.readline()
    server.shutdown(), server.server_close()
    sys.stdin.readline() or sys.exit()
"""

    def __init__(self, folder):
        port = free_port()
        self.uri, self._address = f"http://127.0.0.1:{port}", ("127.0.0.1", port)
        environment = {
            **os.environ,
            "_MLFLOW_SERVER_FILE_STORE": str(folder),
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.program, str(port)],
            env=environment,
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        until(self._answers)

    def toggle(self, up):
        self._process.stdin.write("\n")
        until(lambda: self._answers() == up)

    def end(self):
        self._process.kill()
        self._process.communicate()

    def _answers(self):
        with socket.socket() as probe:
            return probe.connect_ex(self._address) == 0


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("flask")  # installed with moto
    mlflow_server = MlflowServer(tmp_path / "server")
    yield mlflow_server
    mlflow_server.end()


def test_an_mlflow_server_receives_everything_after_an_outage(tmp_path, monkeypatch, server):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run_trackers, warned = start(tmp_path, "mlflow")
    run_trackers.metrics(10, {"loss": 1})
    until(lambda: history("loss"))
    server.toggle(up=False)
    began = time.monotonic()
    for step in (20, 30, 40):
        run_trackers.metrics(step, {"loss": step})
    run_trackers.image(40, "samples", PICTURE)
    assert time.monotonic() - began < 3
    until(lambda: warned)
    time.sleep(0.3)
    server.toggle(up=True)
    run_trackers.metrics(50, {"loss": 50})
    run_trackers.close()
    assert history("loss") == [(10, 1), (20, 20), (30, 30), (40, 40), (50, 50)]
    client, (run,) = mlflow_runs()
    assert run.info.status == "FINISHED" and client.list_artifacts(run.info.run_id, "images")
    assert len(warned) == 1 and warned[0].startswith("MLflow cannot be written to: ")


def test_an_absent_mlflow_server_does_not_stop_training_and_its_password_stays_secret(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:dark-secret@127.0.0.1:{free_port()}")
    began = time.monotonic()
    run_trackers, warned = start(tmp_path, "mlflow")
    for step in range(100):
        run_trackers.metrics(step, {"loss": 1})
    run_trackers.add_event(3, "x")
    run_trackers.close()
    assert time.monotonic() - began < 30
    assert len(warned) == 1 and "dark-secret" not in warned[0] and "127.0.0.1" in warned[0]


def test_an_address_that_mlflow_does_not_support_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://somewhere")
    with pytest.raises(
        UserError,
        match=r"^MLflow cannot use its store \(.*gopher.*\); "
        r"set MLFLOW_TRACKING_URI to a server's address\.$",
    ):
        start(tmp_path, "mlflow")


# -- Weights & Biases ------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """W&B offline. Its process keeps the environment of its start, so it ends with the test."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield wandb
    with suppress(ConnectionError):
        wandb.teardown()


def records(path):
    """The records of a .wandb file.

    The format is LevelDB's log after a header of 7 bytes: blocks of 32 KiB, with CRC, length and
    kind before each fragment.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last fragment of one
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def rows(folder):
    """All logged rows in order: (row number, fields)."""
    found = []
    for path in sorted(Path(folder).glob("wandb/offline-run-*/run-run-7.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                fields = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                found.append(
                    (
                        record.history.step.num,
                        {name: value for name, value in fields.items() if not name.startswith("_")},
                    )
                )
    return found


class Listener:
    """A local server that counts connections."""

    def __init__(self):
        self.calls, self._socket = 0, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        while True:
            self._socket.accept()[0].close()
            self.calls += 1


def test_wandb_offline_contains_everything_and_opens_no_connection(tmp_path, monkeypatch, wandb):
    listener = Listener()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, listener.url)
    run_trackers, warned = start(tmp_path, "wandb")
    run_trackers.metrics(0, {"held_out": 1.5})
    run_trackers.metrics(10, {"loss": 0.5})
    run_trackers.metrics(10, {"held_out": 0.75})
    run_trackers.image(8, "samples", PICTURE)
    run_trackers.add_event(9, "a worker was lost")
    run_trackers.metrics(10, {"loss": 0.5})
    run_trackers.metrics(20, {"loss": 0.25})
    run_trackers.close()
    again, _ = start(tmp_path, "wandb", first_step=21, warned=warned)
    again.metrics(30, {"loss": 0.125})
    again.close()
    until(lambda: rows(tmp_path)[-1][0] == 30)  # W&B's process may still be writing
    logged = rows(tmp_path)
    # Row numbers rise over both starts.
    assert [number for number, _ in logged] == [0, 10, 11, 12, 13, 20, 30]
    assert [fields["step"] for _, fields in logged] == [0, 10, 10, 8, 9, 20, 30]
    assert [fields["loss"] for _, fields in logged if "loss" in fields] == [0.5, 0.25, 0.125]
    assert [fields["note"] for _, fields in logged if "note" in fields] == ["a worker was lost"]
    (picture,) = (fields for _, fields in logged if "samples._type" in fields)
    assert picture["samples.caption"] == "step 8" and (
        picture["samples.width"],
        picture["samples.height"],
    ) == (8, 6)
    first = next(path for path in sorted(tmp_path.glob("wandb/offline-run-*/run-run-7.wandb")))
    run = next(record.run for record in records(first) if record.WhichOneof("record_type") == "run")
    settings = {
        item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"
    }
    assert (run.run_id, run.project, run.display_name) == ("run-7", "glide_ray", "nano-base")
    assert settings["train.batch"] == tiny().train.batch and settings["model.unet.multipliers"] == [
        1,
        2,
    ]
    assert listener.calls == 0 and not warned


def test_a_killed_wandb_service_is_restarted_and_does_not_stop_training(tmp_path, wandb):
    run_trackers, warned = start(tmp_path, "wandb")
    run_trackers.metrics(10, {"loss": 1})
    # W&B's process has received the row, but writes it later.
    until(lambda: run_trackers._threads[0]._store._row == 10)
    (service,) = children("wandb-core")
    os.kill(service, signal.SIGKILL)
    for step in range(20, 1000, 10):  # the first rows may still go to the killed process
        run_trackers.metrics(step, {"loss": step})
        time.sleep(0.1)
        if warned:
            break
    run_trackers.metrics(1000, {"loss": 1000})
    run_trackers.close()
    until(lambda: [fields["loss"] for _, fields in rows(tmp_path)][-2:] == [step, 1000])
    assert len(warned) == 1 and warned[0].startswith("Weights & Biases cannot be written to: ")


def children(name):
    """PIDs of this process's own children with this name."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(stat.parent.name), stat.read_text()
        except OSError:
            continue
        if (
            rest[rest.index("(") + 1 : rest.rindex(")")] == name
            and int(rest[rest.rindex(")") + 2 :].split()[1]) == os.getpid()
        ):
            found.append(pid)
    return found


def test_wandb_without_a_key_is_refused_before_it_prompts_on_the_terminal(
    tmp_path, monkeypatch, wandb
):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(
        UserError,
        match=r"has no API key; run `wandb login`, or set WANDB_API_KEY, "
        r"or set WANDB_MODE=offline\.$",
    ):
        start(tmp_path, "wandb")


def test_invalid_wandb_settings_are_refused_in_one_sentence(tmp_path, monkeypatch, wandb):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(
        UserError,
        match=r"^Weights & Biases cannot be set up \(.*\); "
        r"correct its WANDB_ environment variables\.$",
    ):
        start(tmp_path, "wandb")


def test_an_absent_wandb_server_does_not_stop_training_and_the_key_stays_secret(
    tmp_path, monkeypatch, wandb
):
    for name, value in {
        "MODE": "online",
        "API_KEY": 40 * "d",
        "BASE_URL": f"http://127.0.0.1:{free_port()}",
        "HTTP_TIMEOUT": "1",
        "INIT_TIMEOUT": "1",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    began = time.monotonic()
    run_trackers, warned = start(tmp_path, "wandb")
    run_trackers.metrics(10, {"loss": 1})
    until(lambda: warned)
    run_trackers.close()
    assert time.monotonic() - began < 60
    assert (
        len(warned) == 1
        and warned[0].startswith("Weights & Biases cannot be written to: ")
        and "ddd" not in warned[0]
    )


# -- all trackers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, module, command",
    [
        ("tensorboard", "tensorboard", "pip install 'glide_ray\\[cluster\\]'"),
        ("wandb", "wandb", "pip install 'glide_ray\\[trackers\\]'"),
        ("mlflow", "mlflow", "pip install 'glide_ray\\[trackers\\]'"),
    ],
)
def test_the_error_of_a_missing_package_names_the_command_that_installs_it(
    tmp_path, monkeypatch, name, module, command
):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    sentence = (
        rf"^train.trackers has '{name}', whose package cannot be imported \(.*\); "
        rf"run `{command}`, or leave '{name}' out\.$"
    )
    with pytest.raises(UserError, match=sentence):
        open_trackers(["tensorboard", name], tmp_path, tiny(), "run-7")
    # No tracker was started.
    assert "glide-TensorBoard" not in Counter(thread.name for thread in threading.enumerate())


def test_a_run_without_trackers_sends_nothing(tmp_path):
    assert override(tiny(), ["trackers=none"]).train.trackers == ()
    run_trackers = open_trackers((), tmp_path, tiny(), "run-7")
    run_trackers.metrics(1, {"loss": 1})
    run_trackers.close()
    assert not list(tmp_path.iterdir())


def test_several_trackers_receive_the_same_and_a_failing_one_delays_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    warned = []
    run_trackers = open_trackers(
        tiny("base", "trackers=mlflow,tensorboard").train.trackers,
        tmp_path,
        tiny(),
        "run-7",
        warn=warned.append,
    )
    run_trackers.metrics(10, {"loss": 1})
    until(
        lambda: (
            (tmp_path / "tensorboard").exists()
            and "loss" in events(tmp_path).Tags()["scalars"]
            and warned
        )
    )
    run_trackers.close()
    assert len(warned) == 1 and scalars(tmp_path, "loss") == [(10, 1)]
