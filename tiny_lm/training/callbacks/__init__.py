"""Lightning callbacks, in the order in which ``fit.py`` lists them."""
