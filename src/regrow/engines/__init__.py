"""Floor 3: the only code that walks, gates, changes, trains or times nn.Modules."""
