"""Optimizers of row-sparse gradients.

`lazy` takes any optimizer of optax; `optimizers` and `adagrad` have named ones. Replay makes up for the steps in which
a row was not read: `replaying`, `up_to_date`, and the sums of `catch_up`. Two wrappers go around an optimizer:
`rounding` keeps small updates of 16-bit tables, `averaging` an average of the parameters. `before` checks what
`before=` may be.
"""
