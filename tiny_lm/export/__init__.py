"""Export trained models to the formats of other programs, and verify them."""
