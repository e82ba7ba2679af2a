"""Floor 4: load, score, plan, apply, recover, evaluate, export; each short, none imports another."""
