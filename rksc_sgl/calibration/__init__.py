"""The certificate of early exits: traces, read-outs, risk control, profiles; plain numbers, no server and no model."""
