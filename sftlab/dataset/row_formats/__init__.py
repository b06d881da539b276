"""Formats of rows, recognised by columns and first rows, and the conversion of rows to conversations."""
