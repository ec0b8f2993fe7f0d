"""Forward passes that stop between layers, for exits, merges and blends."""
