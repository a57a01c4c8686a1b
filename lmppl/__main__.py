"""`python -m lmppl` is the command line."""

from lmppl.cli import main

main()
