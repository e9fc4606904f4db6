"""The console: pages and an API for operators, in a process of its own beside the intake.

``lists`` and ``deeds`` are what pages and API share; ``pages``, ``acts``, ``live`` and ``api`` are the ways in.
"""
