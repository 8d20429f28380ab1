"""Train steps on the rows that they read, and the loops around them.

`jit` and `rowwise` evaluate a step on the rows that it reads; `host_rows` or `device_rows` choose these rows. `grad`
does the same for a gradient alone. `explain` says what is row-sparse. `step` makes a train step, `loops` runs epochs,
`evaluation` measures a test set. `refresh` brings rows up to date, `resize` changes the number of rows of tables,
`packing` stores tables for TPU.
"""
