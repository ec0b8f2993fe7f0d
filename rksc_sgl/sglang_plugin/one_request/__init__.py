"""One request is one fork, in the HTTP process: its routes, its requests, its answer (:mod:`rksc_sgl.one_request`)."""
