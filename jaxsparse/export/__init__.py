"""A model as NumPy source, which runs without JAX and without this library.

`scoring` is `js.export_numpy`. It traces a model at a few sizes of its inputs (`inputs`), makes one program of these
whose sizes are formulas (`sizes`, `flat`), and writes a line for each of its equations (`writer`, with rules by what
equations do: `elementwise`, `shapes`, `reductions`, `products`, `indexing`). `helpers` is what written models contain.
"""
