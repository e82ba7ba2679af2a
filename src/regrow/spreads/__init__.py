"""Floor 2: pure functions that share a number of kept units among the layers."""
