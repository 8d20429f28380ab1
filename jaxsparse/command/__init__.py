"""`python -m jaxsparse train` and `predict`: a model of a file, without a line of Python.

`files` reads it, `models` has what can be trained, `run` trains, saves, goes on and predicts.
"""
