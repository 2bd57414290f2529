"""A test cluster on this machine: raylets started with `ray start`, jobs via `ray job submit`."""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

from glide_ray.bench.load_generator import free_port
from helpers.paths import ROOT
from helpers.processes import answers

RAY = str(Path(sys.executable).parent / "ray")
START_SECONDS, TRIES = 60, 3


class LocalCluster:
    """A head node with a dashboard, and worker nodes that tests add and kill.

    `end()` kills all its processes.
    """

    def __init__(self, head_cpus):
        # A short path, because it contains Unix sockets.
        self.folder = tempfile.mkdtemp(prefix="glide-ray-")
        # As in `ray-cluster.yaml`: workers find Python's programs, and `serve/` in the checkout.
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
            "RAY_TRAIN_V2_ENABLED": "1",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.started = []
        subprocess.run(
            [RAY, "get-auth-token", "--generate"],
            env=self.environment,
            check=True,
            capture_output=True,
        )
        # Another process may take a free port in the seconds before Ray binds it. The head then
        # keeps running although parts of it never answer, so start a new one.
        for _ in range(TRIES):
            self.port, self.dashboard = free_port(), free_port()
            head = self._start(
                "--head",
                f"--port={self.port}",
                f"--num-cpus={head_cpus}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.dashboard}",
                f"--ray-client-server-port={free_port()}",
                f"--temp-dir={self.folder}",
            )
            if self._comes(head, self.dashboard, self.agent):
                return
            log = self._log()
            self.end()
        raise AssertionError(
            f"no head of a cluster came up in {TRIES} tries of {START_SECONDS} s; "
            f"the last one said:\n{log}"
        )

    def add_node(self, cpus):
        """Start a raylet with this number of CPUs; returns its `ray start` process."""
        return self._start(f"--address=127.0.0.1:{self.port}", f"--num-cpus={cpus}")

    def kill(self, node):
        """Kill a raylet and its workers at once, like a machine that fails."""
        for process in psutil.Process(node.pid).children(recursive=True):
            process.kill()
        node.kill()
        node.wait()

    def submit(self, *arguments, wait=True):
        """Run a script of the checkout with `ray job submit`.

        Returns the JSON that it prints, or the running process if not `wait`.
        """
        command = [
            RAY,
            "job",
            "submit",
            "--address",
            f"http://127.0.0.1:{self.dashboard}",
            "--working-dir",
            str(ROOT),
            "--",
            sys.executable,
            *arguments,
        ]
        job = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self.result(job) if wait else job

    @staticmethod
    def result(job, seconds=480):
        try:
            output = job.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            job.kill()
            raise AssertionError(
                f"not done after {seconds} s: {job.communicate()[0][-3000:]}"
            ) from None
        assert job.returncode == 0, output[-3000:]
        return next(
            json.loads(line) for line in reversed(output.splitlines()) if line.startswith("{")
        )

    def end(self):
        for started in reversed(self.started):
            if started.poll() is None:
                self.kill(started)

    def _start(self, *arguments):
        log = open(Path(self.folder) / f"start-{len(self.started)}.log", "w")
        # A separate agent port for this node, because jobs are sent to it and another Ray cluster
        # may use the default port.
        self.agent = free_port()
        started = subprocess.Popen(
            [
                RAY,
                "start",
                "--block",
                "--node-ip-address=127.0.0.1",
                f"--object-store-memory={150 * 2**20}",
                "--disable-usage-stats",
                f"--dashboard-agent-listen-port={self.agent}",
                # Any free ports for workers: nodes of this machine would hand out the same ones.
                "--min-worker-port=0",
                "--max-worker-port=0",
                *arguments,
            ],
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        self.started.append(started)
        return started

    @staticmethod
    def _comes(node, *ports):
        """Whether a started node listens on all of these ports within START_SECONDS."""
        deadline = time.monotonic() + START_SECONDS
        while node.poll() is None and time.monotonic() < deadline:
            if all(answers(port) for port in ports):
                return True
            time.sleep(0.2)
        return False

    def _log(self):
        """The ends of the log of the last started node and of the head's log files."""
        files = [
            Path(self.folder) / f"start-{len(self.started) - 1}.log",
            *(
                Path(self.folder) / "session_latest" / "logs" / name
                for name in ("gcs_server.out", "dashboard.log", "dashboard_agent.log")
            ),
        ]
        return "\n".join(
            f"-- {file.name}\n{file.read_text(errors='replace')[-1500:]}"
            for file in files
            if file.exists()
        )


@contextmanager
def cluster(head_cpus, *nodes):
    local_cluster = LocalCluster(head_cpus)
    try:
        yield local_cluster, [local_cluster.add_node(cpus) for cpus in nodes]
    finally:
        local_cluster.end()
