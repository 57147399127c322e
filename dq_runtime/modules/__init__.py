"""The two linears: one that serves (QuantLinear) and one that is rounded (StudentLinear)."""
