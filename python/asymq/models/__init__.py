"""One file per model family of transformers, named after its `config.model_type`.

Each has ``MODEL``, the class it prepares, and ``plan(preparation, model)``, which names the
quantizers of all sites. ``asymq.prepare`` finds the file; every other model is planned by
`generic.py`.
"""
