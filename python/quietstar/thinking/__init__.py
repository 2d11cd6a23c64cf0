"""Think: how thoughts lie in a pass, attention, rollout, packed pass; what a decoder must offer."""
