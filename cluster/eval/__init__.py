"""``ernie eval nano``: scores a running cluster on held-out samples of the nano model's world."""
