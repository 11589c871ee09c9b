"""Measurements that need a clone. Those of the command `fade` are in fade_fast/measure."""
