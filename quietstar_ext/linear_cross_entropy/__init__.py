"""Cross entropy of an output layer without rows x vocabulary in memory."""

from quietstar_ext.linear_cross_entropy.api import linear_cross_entropy as linear_cross_entropy
from quietstar_ext.linear_cross_entropy.api import linear_cross_entropy_sum as linear_cross_entropy_sum
