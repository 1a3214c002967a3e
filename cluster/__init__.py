"""How many workers there are, where they run, and who gets which request."""
