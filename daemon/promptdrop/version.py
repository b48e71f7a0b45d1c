"""The version of this package, for whatever writes it down; pyproject.toml reads it from here."""

__version__ = "0.2.0.dev0"
