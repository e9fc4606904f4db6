"""How fast the worker drains deliveries without files: `python -m bench.worker`."""
