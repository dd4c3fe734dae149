"""The version, read by setup.py and pyproject.toml too."""

__version__ = "0.1.0"
