"""A forward pass that stops between layers: who wants to look there, and what goes on. No SGLang."""
