"""Attention of some tokens of each sequence, far apart as they may lie, in one operation. No SGLang."""
