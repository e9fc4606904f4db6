"""Bare Debian hosts in containers, each able to run an engine of its own."""
