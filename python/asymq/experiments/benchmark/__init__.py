"""What asymq costs.

ops: one fake-quantize in multiples of a copy. step: a training step in multiples of the float
model's. recipes: a step and generating with a
deployment recipe. profile: where a step goes. recorded: files of results, and comparing with them.
"""
