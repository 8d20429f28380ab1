"""Readers of files, which return chunks of examples. `lines` reads text files and collects bad lines, `columns` says
what each column is, `digits` parses small integers; then one module for each format. To add a format, subclass
`lines.LineReader`.
"""
