"""Neural networks: the only room that imports torch."""
