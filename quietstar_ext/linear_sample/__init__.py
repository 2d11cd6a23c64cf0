from quietstar_ext.linear_sample.api import linear_sample as linear_sample
