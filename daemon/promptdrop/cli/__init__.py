"""What people type: each command beside its arguments, and what it prints.

The roof of the house: it may import from every folder, and no folder imports from it. A command that
renders nothing imports no torch, so that it answers at once.
"""
