"""What reaches our operators below autograd, for tests of what they were called with."""

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCalls(TorchDispatchMode):
    """Keeps (operator, arguments) of every call: forwards and backwards, not the public names."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "asymq":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))
