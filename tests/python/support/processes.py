"""Functions and scripts in processes on the CPU, of one thread each: forked from one process that
has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed as dist

METHOD = "forkserver"
_context = multiprocessing.get_context(METHOD)
_context.set_forkserver_preload(
    [
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.opt.modeling_opt",
        "torch.distributed.fsdp",
        "asymq.experiments.table2.run",
    ]
)


def run(function, *arguments):
    """function(rank, *arguments) in two processes joined by gloo, of which one rank prints what
    went wrong."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(
        _start, (port, function, arguments), nprocs=2, start_method=METHOD
    )


def _start(rank, port, function, arguments):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


class Script(_context.Process):
    """`python script *arguments`, started; what it prints is in the file `output`."""

    def __init__(self, output: Path, script, *arguments):
        self.output = output
        super().__init__(target=_run_script, args=(output, *map(str, (script, *arguments))))
        self.start()

    def finish(self) -> str:
        """What it has printed, once it has ended well."""
        self.join(300)
        text = self.output.read_text()
        assert self.exitcode == 0, text
        return text


def _run_script(output: Path, script: str, *arguments: str) -> None:
    with output.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    # Sums are added in the same order however busy the machine is.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
