"""Owns every request from admission to its last event."""
