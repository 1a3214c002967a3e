"""Process groups, expert dispatch and KV transport: torch.distributed behind small interfaces."""
