"""Parsers of ``eipnn-job``: status and arrays into nodes."""
