"""Tests on hosts that are made for them, each with an engine of its own: `make test-cluster`, not in `make test`."""
