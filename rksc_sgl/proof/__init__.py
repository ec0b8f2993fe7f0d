"""Whether a running server reuses what it says, and nothing else: real text, the runs on it, and the verdict."""
