"""Metrics of every part under Prometheus names: defined once, shown on one page of the router and by Ray's agents."""
