"""The loss and the range gradients of a cell's first step, run by one or more processes, replicated
and split: saved as MODEL_ddp.pt and MODEL_fsdp2.pt.

first_step.py DATA OUT MODEL...
"""

import sys
from pathlib import Path

import torch

import asymq
from asymq.experiments.common import text
from asymq.experiments.common.processes import Processes
from asymq.experiments.table2.cell import backward
from asymq.experiments.table2.protocol import Protocol
from asymq.experiments.table2.subject import open_subject


def first_step(model, data, processes):
    protocol = Protocol(batch=4)
    subject = open_subject(model, *text.read(data), protocol)
    batches = [text.batch_of(subject.train, step, protocol.batch, seed=0) for step in range(3)]
    model = asymq.prepare(subject.load(), protocol.config("min_max"))
    asymq.freeze_weights(model)
    processes.place(model)
    asymq.calibrate(model, batches)
    loss = backward(processes.replicate(model), batches[0], processes)
    gradients = {
        f"{name}.{key}": parameter.grad
        for name, quantizer in asymq.named_quantizers(model)
        for key, parameter in quantizer.named_parameters()
    }
    return {"loss": loss, "gradients": gradients}


def main(data, out, *models):
    for model in models:
        for shard in (False, True):
            processes = Processes("cpu", shard)
            found = first_step(model, data, processes)
            if processes.first:
                torch.save(found, f"{out}/{Path(model).name}_{'fsdp2' if shard else 'ddp'}.pt")
    processes.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
