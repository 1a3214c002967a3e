"""Bounds what may be drawn: structured output and the thinking budget."""
