"""``quietstar demo``: thoughts learned on this machine."""
