"""A step as a program, and its evaluation on some rows.

`tracing` makes the program and `states` finds what it updates. `planning` finds out which arrays share which rows.
`walk` evaluates the program, with the rules of `row_elementwise`, `row_rules`, `row_reads` and `row_regions`, on the
kinds of value in `values`; what is made row by row waits in `pieces` until it is written.
"""
