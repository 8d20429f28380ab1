"""Optimizers of row-sparse gradients.

Any of optax (`lazy`); named ones (`optimizers`, `adagrad`); those that make up for the steps in which a row was not
read (`replaying`, `up_to_date`, with the sums of `catch_up`); and what goes around an optimizer: small updates of
16-bit tables (`rounding`), an average of the parameters (`averaging`).
"""
