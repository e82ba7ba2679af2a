"""Floor 2: declarations of what can be cut in a model layout, one small file a layout."""
