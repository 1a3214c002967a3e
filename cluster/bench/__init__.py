"""``ernie bench``: load on a running server from outside, over gRPC or HTTP, and what its clients would feel."""
