"""Verification that stops at an intermediate layer: the rules, the walk through the layers, the audit."""
