"""The waiting queue: who waits, and what each branch gets. Decisions are :mod:`rksc_sgl.placement`'s."""
