"""Measuring what thoughts do.

perplexity   negative log-likelihood per token with and without thoughts, and by difficulty
"""
