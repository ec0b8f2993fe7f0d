"""Verification of a fork: whom to ask, what to ask, how to read the reply, and what is selected. No SGLang."""
