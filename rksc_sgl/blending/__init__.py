"""Which KV of a donor a branch may take, and what it takes to move it to the branch's positions."""
