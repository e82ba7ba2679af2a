"""Floor 1: frozen data that travels between stages. Import from the modules, not from here."""
