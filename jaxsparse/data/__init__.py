"""From SciPy matrices, id lists and examples to batches.

`inputs` checks them, `features` and `pipeline` make batches of static shapes (`batch`), which carry their distinct ids
(`distinct`). The e-mails of the examples are here as well.
"""
