"""Floor 2: what happens to the weights that stay, one small file a solver."""
