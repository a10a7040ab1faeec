"""Token streams in ``.bin`` files, and batches of sequences from them."""
