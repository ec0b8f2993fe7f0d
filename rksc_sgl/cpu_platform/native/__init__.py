"""What a decoder layer does between its matrix products, compiled from one file of C when a server first starts.

A decode step of a small model is some thirty operations a layer on a few thousand numbers each: in PyTorch it takes
longer to call them than to compute them, and its fused attention is made for more rows than a decode step has.
``build`` compiles ``layers.c`` with the machine's C compiler, once, into the user's cache; ``passes`` lays
out the reads of a pass for it. Where there is no compiler, everything runs as PyTorch operations, and the log says so.
"""
