"""From SciPy matrices, id lists and examples to batches.

`inputs` and `csr` check them, `features` and `pipeline` make batches of static shapes (`batch`), which carry their
distinct ids (`distinct`), in an order (`order`). `stream` does so with `chunks` of what is larger than memory, in a few
sizes (`rungs`); `csr_files` are matrices in files. The e-mails of the examples are here as well.
"""
