"""The train step and what goes around it.

`jit` and `rowwise` evaluate a step on the rows that it reads; `host_rows` or `device_rows` choose the rows. `grad` does
so for a gradient alone, and `explain` says what is row-sparse. `step` makes a train step, `loops` runs epochs,
`evaluation` measures a test set. `refresh` brings rows up to date, `resize` changes the rows of tables, `packing`
stores tables for TPU.
"""
