"""Two processes that stay in one process group and run functions of the tests together."""

import traceback

import torch
from torch import multiprocessing

from glide_ray.bench.load_generator import free_port
from helpers.training import join_two_ranks

ANSWER_SECONDS = 300


class TwoRanks:
    """Two ranks on gloo. Each starts once: importing DeepSpeed takes longer than most tests."""

    def __init__(self):
        context, port = multiprocessing.get_context("spawn"), free_port()
        pipes = [context.Pipe() for _ in range(2)]
        self._connections = [own for own, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, port, other), daemon=True)
            for rank, (_, other) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function, *arguments):
        """Call `function(rank, *arguments)` on both ranks. Raises the error of the first failed."""
        for connection in self._connections:
            connection.send((function, arguments))
        for rank, connection in enumerate(self._connections):
            assert connection.poll(ANSWER_SECONDS), f"rank {rank} does not answer"
            error = connection.recv()
            assert error is None, f"on rank {rank}: {error}"

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank, port, connection):
    torch.set_num_threads(1)
    join_two_ranks(rank, port)
    while True:
        function, arguments = connection.recv()
        try:
            function(rank, *arguments)
            connection.send(None)
        except Exception:
            connection.send(traceback.format_exc())
