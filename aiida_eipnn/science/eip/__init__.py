"""Empirical interatomic potentials as labellers."""
