"""Draws the next token of every sequence of a step."""
