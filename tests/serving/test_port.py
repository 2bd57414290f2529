"""The address of `glide serve`, if another program has it."""

import socket

from glide_ray.cli.main import main


def test_a_taken_port_is_one_sentence_before_ray_starts(capsys, monkeypatch):
    def connect(*_):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("glide_ray.distributed.cluster.connect", connect)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"127.0.0.1:{port} cannot be listened on" in error
    assert "--port" in error
