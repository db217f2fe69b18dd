"""Linear algebra on operators: solve, invert, factor, sample. Nothing is exported yet."""

__all__: list[str] = []
