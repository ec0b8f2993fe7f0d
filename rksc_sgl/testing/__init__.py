"""What our tests and yours need: small models that are made in a second."""

from rksc_sgl.testing.tiny_model import ARCHITECTURES, write_tiny_model

__all__ = ["ARCHITECTURES", "write_tiny_model"]
