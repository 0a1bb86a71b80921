"""Numbers only: which steps are full, and the coefficients of the others."""
