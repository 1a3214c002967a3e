"""The ranks of an engine: the leader sends each its part of a step, computes its own, and gathers the results."""
