"""`python -m jaxsparse train` and `predict`: a model of a file of any size, without a line of Python.

`files` says which format and columns it has, `examples` streams it, `models` has what can be trained, `checkpoints` is
a training that stops and goes on at any step, `run` trains, measures and predicts.
"""
