"""Planning: which workers, which owner, how long, how much. Pure."""
