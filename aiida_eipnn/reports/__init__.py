"""A finished or running loop, read from the graph: history, lineage, report."""
