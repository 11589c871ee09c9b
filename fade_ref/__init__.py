"""The specification of FADE in float64, to be read, not to be fast.

Read in this order: config, tiers, quantize, rotation, product, rope, attention, importance, scores,
plan, policies, select, summaries, cache.
"""
