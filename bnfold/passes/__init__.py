"""What rewrites a graph: folding, merging, equalisation."""
