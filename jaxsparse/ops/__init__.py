"""Pure functions on arrays.

On BCOO batches (`bcoo`), embedding bags (`embedding`) and the logits of many classes (`losses`); and what they stand
on, rows of tables (`rows`) and gradients that hold some of them (`row_sparse`).
"""
