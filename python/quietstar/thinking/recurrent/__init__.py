"""Layers that pass a state from token to token (short convolutions, linear attention, state spaces): a
column's slots continue the recurrence from the state behind its anchor, exactly."""
