"""A trained model behind an address: for programs, and for people in a browser."""
