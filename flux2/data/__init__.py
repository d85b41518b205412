"""Records, readers, the deterministic sampler, and the sign world."""
