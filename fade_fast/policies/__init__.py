"""Which tokens stay, and in which tier: scores of attention, and plans made from them."""
