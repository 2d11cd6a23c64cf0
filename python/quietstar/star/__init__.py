"""STaR: a model that bootstraps reasoning from its own rationales (Zelikman et al. 2022).

Iteration n: the model of n - 1 writes a rationale and an answer for every problem; where the answer is
right it is kept. What failed is tried again with the answer as a hint, and kept without it. On both the
*original* model is fine-tuned, which makes model n. `loop` is this in order, `quietstar star` the
command.
"""
