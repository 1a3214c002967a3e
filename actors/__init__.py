"""How one worker does its job, given a config."""
