"""One cut-over of one host, from the first check to the record. `run.Rollout` is the way in.

Rooms: `model` (what a release is), `plan` (what differs, in which order, what is risky), `prepare` (images, nginx -t,
migration), `instances` and `edge` (replacing them), `rehearsal` and `private_listeners` (a new nginx out of the clients'
sight), `switch` (the files nginx looks at), `gates`, `sockets` (who is still connected), `leftovers` (of a run that was
killed), `undo` (the way back), `journal` (progress and record), `signals`, `compose` and `evidence`.
"""
