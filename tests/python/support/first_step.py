"""Saves the loss and the range gradients of a cell's first step, run by one or more processes.

first_step.py MODEL DATA OUT [--fsdp]
"""

import sys

import torch

import asymq
from asymq.experiments.common import text
from asymq.experiments.common.processes import Processes
from asymq.experiments.table2.cell import backward
from asymq.experiments.table2.protocol import Protocol
from asymq.experiments.table2.subject import open_subject


def main(model, data, out, *options):
    processes = Processes("cpu", shard="--fsdp" in options)
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
    if processes.first:
        torch.save({"loss": loss, "gradients": gradients}, out)
    processes.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
