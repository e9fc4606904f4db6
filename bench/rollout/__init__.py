"""How long a rollout takes and what it costs the senders, beside the procedure that it replaces, in one run."""
