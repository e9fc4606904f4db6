"""``python -m bench.intake``: how fast deliveries are taken, beside a reference, in one run."""
