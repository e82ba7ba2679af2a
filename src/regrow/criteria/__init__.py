"""Floor 2: pure functions that score units, one small file a criterion."""
