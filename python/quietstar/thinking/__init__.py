"""Think: how thoughts lie in a pass, attention, rollout, packed pass; what a decoder must offer."""

from quietstar.lazy import lazy_attributes

# What the module of this name held in version 0.1.0.
__getattr__ = lazy_attributes(
    "quietstar",
    dict.fromkeys(
        ("RULES", "FollowingThinking", "SpokenThought", "Thinking"), "modeling.generation_state"
    ),
)
