"""Measuring what thoughts do.

perplexity   negative log-likelihood per token with and without thoughts, and by difficulty
scores       predictions token by token, with shuffled thoughts and none as controls
controls     the same by blocks: thought alone, shuffled thoughts, pause tokens, in one run
reasoning    zero-shot GSM8K and CommonsenseQA: probability of the gold answer, accuracy
completions  any prompts and completions: probability of the completion, accuracy, NLL
chains       chain of thought with a majority vote
items        rows of a benchmark, from the hub or a local file
statistics   bootstrap intervals
tasks        the above as tasks of ``quietstar eval``
run          tasks, chosen and run; journal: finished items on disk; table: the results as text
harness      the model type ``quietstar`` for lm-evaluation-harness (needs the extra ``eval``)
"""
