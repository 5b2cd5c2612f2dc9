"""AiiDA nodes: sets of configurations, labels, splits, committees."""
