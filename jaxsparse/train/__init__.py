"""What is called around a step.

`jit` and `rowwise` put it on the rows that it reads, which `host_rows` or `device_rows` choose; `grad` does so for a
gradient alone; `explain` says what is row-sparse. `step`, `loops` and `evaluation` are a step, an epoch and a test set.
`refresh` brings every row up to date.
"""
