"""The specification of FADE in float64, to be read, not to be fast.

Read in this order: config, tiers, quantize, rotation, rope, attention, importance, scores, plan, policies,
select, summaries, cache. `baselines` and `product` are codecs to compare with, which no cache has.
"""
