"""Workers as Serve replicas: a name of their own, a place in the planner's registry, an orderly end."""
