"""The trainer and what it owns."""
