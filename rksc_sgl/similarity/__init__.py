"""Which prefixes are alike, and whether they ask the same thing: alignment, similarity gate, content guard."""
