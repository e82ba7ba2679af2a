"""Floor 6: the report as one self-contained HTML page."""
