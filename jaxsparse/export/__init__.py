"""Export of a model as NumPy source, which runs without JAX and without this library.

`scoring` holds `js.export_numpy`. It traces a model at a few sizes of its inputs (`inputs`) and merges the traces into
one program, whose sizes are formulas (`sizes`, `flat`). `writer` writes a line for each equation, by the rules in
`elementwise`, `shapes`, `reductions`, `products`, `indexing` and `loops`. `source` puts the file together, with the
functions of `helpers` that the model calls.
"""
