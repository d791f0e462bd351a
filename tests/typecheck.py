"""The type checker that pytest puts around every function of the package (see pyproject.toml)."""

from beartype import BeartypeConf, beartype

__all__ = ["checked"]

# An int is as good as a float, as everywhere in Python's type system.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
