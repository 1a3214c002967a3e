"""Trains the built-in nano model. Not part of the installed package."""
