"""Decides what is computed when, and which KV blocks hold what. No tensors."""
