"""The commands that people type: each beside its arguments and what it prints.

`main` is the entry point, `parser` lists the commands. This folder may import from every other, and
none imports from it. A command that renders nothing imports no torch, so that it answers at once.
"""
