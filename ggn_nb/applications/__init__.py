"""What people come for: covariances of predictions, evidence, influence. Public names are in `ggn_nb`."""

__all__: list[str] = []
