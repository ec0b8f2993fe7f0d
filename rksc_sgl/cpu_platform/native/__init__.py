"""Decoder layers and linear layers, compiled from one file of C when a server first starts.

A decode step of a small model is some thirty operations a layer on a few thousand numbers each: in PyTorch it takes
longer to call them than to compute them, its fused attention is made for more rows than a decode step has, and its
matrix products read weights at half of the memory's speed. ``build`` compiles ``layers.c`` with the machine's C
compiler, once, into the user's cache; ``linear`` lays out weights for it, ``passes`` the reads of a pass, and ``stack``
runs layers. Where there is no compiler, everything runs as PyTorch operations, and the log says so.
"""
