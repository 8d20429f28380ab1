"""Pure functions on arrays.

BCOO batches (`bcoo`), embedding bags (`embedding`), losses (`losses`, `multilabel`), metrics (`metrics`), sparse codes
(`pursuit`). They are built on rows of tables (`rows`), tables packed for TPU (`packed`) and row-sparse gradients
(`row_sparse`).
"""
