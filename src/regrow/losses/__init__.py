"""Floor 2: what a student is trained to lower, one small pure function a loss."""
