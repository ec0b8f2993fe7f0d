"""Forks, anchors and donors: who may take whose KV; plain values, no SGLang."""
