"""A branch that takes its donor's prompt: how it leaves its batch and comes back."""
