"""placeholder"""


def run(options, protocol):
    raise NotImplementedError
