"""How good is a rounded model? KL, perplexity and agreement on held-out windows; report and plots."""
