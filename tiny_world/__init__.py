"""A world of drawn pictures whose true quality (gold) is known, and the models trained in it."""
