"""Chain (LF-MMI) training: graphs and objective, after Povey et al. 2016 and Kaldi's chain models."""
