"""Who gets which request: filter, score, pick, over an immutable view. Pure."""
