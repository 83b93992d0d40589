"""Questions, groups of answers, packed micro-batches, rollout files, and the synthetic task. CPU only."""
