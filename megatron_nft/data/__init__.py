"""Questions, groups of answers, packed micro-batches, and the synthetic task. CPU only."""
