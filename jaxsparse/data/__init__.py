"""From SciPy matrices, id lists and examples to batches.

`inputs` and `csr` check the data. `features` and `pipeline` make batches (`batch`) of static shapes, in an order
(`order`), with their distinct ids (`distinct`). `stream` does the same for data larger than memory, which come in
`chunks`, in a few shapes (`rungs`). `readers` read files, `csr_files` keeps matrices in files, `hashing` makes ids of
strings. spamassassin.tsv.xz has the e-mails of `python -m jaxsparse`.
"""
