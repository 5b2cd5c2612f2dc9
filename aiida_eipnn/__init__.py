"""Empirical interatomic potentials, DFT and neural networks in one provenance graph."""

__version__ = "0.1.0"
