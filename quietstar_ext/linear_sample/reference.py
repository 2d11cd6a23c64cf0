"""Reference of linear_sample: all logits at once, in float64."""

from __future__ import annotations

from quietstar_ext.linear_sample.call import LinearSample
from quietstar_ext.sample_tokens import reference as sampling
from quietstar_ext.sample_tokens.call import Drawn


def reference(call: LinearSample) -> Drawn:
    """A row that cannot be sampled gets token -1 and log-probability NaN."""
    logits = call.hidden.double() @ call.weight.double().T * call.logit_scale
    if call.softcap is not None:
        logits = call.softcap * (logits / call.softcap).tanh()
    return sampling.reference(call.of_logits(logits))
