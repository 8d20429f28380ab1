"""Optimizers for row-sparse gradients.

`lazy` wraps any optax optimizer; `optimizers` and `adagrad` have named ones. Replay applies the steps in which a row
was not read when the row is next needed: `replaying`, `up_to_date`, and the sums in `catch_up`. Two wrappers go around
an optimizer: `rounding` keeps small updates of 16-bit tables, `averaging` an average of the parameters. `before` checks
the argument `before=`.
"""
