"""``python -m rksc_sgl.cli`` is ``rksc``."""

from rksc_sgl.cli import main

main()
