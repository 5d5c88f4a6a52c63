"""Functions in two processes on the CPU, joined by gloo."""

from __future__ import annotations

import os
import socket
import warnings

import torch
from torch import distributed as dist


def run(function, *arguments):
    """function(rank, *arguments) in two processes, of which one rank prints what went wrong."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(_start, (port, function, arguments), nprocs=2)


def _start(rank, port, function, arguments):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
