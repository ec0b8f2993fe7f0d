"""What this server offers: read and tried once, when its scheduler is ready (:mod:`rksc_sgl.support` decides)."""
