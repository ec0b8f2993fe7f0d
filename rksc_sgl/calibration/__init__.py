"""The certificate of early exits, from plain numbers: no server and no model.

Words of this room: a *trace* is one full-depth verification with the hidden states of earlier layers; a *read-out*
foresees the verdict from such a state; a *risk* is the bound that a certificate keeps; a *point* is a rule with its
certificate; a *profile* is what a server needs to exit by it.
"""
