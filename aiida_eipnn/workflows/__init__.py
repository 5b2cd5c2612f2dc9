"""WorkChains: DFT labels in lanes, training with restarts, the active-learning loop."""
