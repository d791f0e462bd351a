"""The sections of the report: a table in, words and figures out."""
