"""Whose KV there is to share: forks with their anchors, donors and aliases, and the prompts of the whole cache."""
