"""Talk and learn: the losses of both predictions, the rewards of thoughts, the policy term."""
