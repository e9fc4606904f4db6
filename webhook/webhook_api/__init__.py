"""The webhook service: durable intake of fal.ai's training results, and the worker that applies them."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "1.0.0"
