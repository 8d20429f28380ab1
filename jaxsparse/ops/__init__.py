"""Pure functions on arrays.

Products and sums of BCOO batches (`bcoo`), embedding bags (`embedding`), losses (`losses`, `multilabel`), metrics
(`metrics`) and sparse codes (`pursuit`). They use reads and writes of rows (`rows`, `row_dma` on TPU), tables packed
for TPU (`packed`) and row-sparse gradients (`row_sparse`).
"""
