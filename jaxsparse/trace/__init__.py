"""Traces a train step into a program and evaluates the program on some rows of its tables.

`tracing` makes the program and `states` finds the arrays that it updates. `planning` finds which arrays share rows.
`walk` evaluates the program with the rules of `row_elementwise`, `row_rules`, `row_reads` and `row_regions`. `values`
has the kinds of value, and `pieces` the blocks of rows that are computed when they are written.
"""
