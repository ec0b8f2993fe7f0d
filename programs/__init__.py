"""Reasoning programs on SGLang with the primitives of rksc_sgl; each runs alone with ``--help``."""
