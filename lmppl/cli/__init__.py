"""The command line, `lmppl`: demo, check, infer and compare. Each command imports what it needs when it runs."""

from lmppl.cli.app import app, main

__all__ = ["app", "main"]
