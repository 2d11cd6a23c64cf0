"""Measuring what thoughts do.

perplexity   negative log-likelihood per token with and without thoughts, and by difficulty
scores       predictions token by token, with shuffled thoughts and none as controls
"""
