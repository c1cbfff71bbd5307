"""The command line: one click file per command, loaded when it is called, so that `--help` needs no extra and answers at once.

A command's body parses, calls one function of the folder that does the work, and prints; `main.py` is the entry point.
"""
