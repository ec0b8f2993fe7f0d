"""Verification that stops at an intermediate layer: the rules, the walk through the layers, the selection, the audit.

Serving runs this code, and calibration certifies it.
"""
