"""Computes a step on one rank: batch, attention over the paged cache, memory."""
