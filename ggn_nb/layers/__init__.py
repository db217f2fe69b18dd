"""Layers: what a model's layers give and one product cannot. Nothing is exported yet."""

__all__: list[str] = []
