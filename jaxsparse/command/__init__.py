"""`python -m jaxsparse train` and `predict`: models of files of any size, without Python code.

`files` finds a file's format and columns, `examples` streams its examples, `models` has the three models, `checkpoints`
saves and restores a run at any step, `run` has the options and trains, measures and predicts.
"""
