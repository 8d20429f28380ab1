"""Files as people have them, in chunks of examples: `lines` (text and its bad lines), `columns` (what columns mean),
and a file for each format. The public functions are those of `jaxsparse`.
"""
