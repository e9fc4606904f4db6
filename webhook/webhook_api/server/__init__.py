"""How requests are read and answered: a worker of gunicorn whose one loop holds every connection.

Threads never read from a socket, so a slow or silent sender costs a connection and nothing else
(docs/decisions/0420).
"""
